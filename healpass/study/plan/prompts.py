"""Tasks as the tokens of a model's prompts. Layer: study. Imports `errors` and `plan.tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from healpass.errors import StudyError
from healpass.study.plan.tasks import Task

#: Templates that print today's date get this one: another day must not be another prompt.
DATE = "26 Jul 2024"
#: In front of a template it hides the function that asks the clock.
_PINNED = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"


def chat(tokenizer: Any, prompt: str) -> str:
    """The text of one user message in the model's chat format, its date pinned to `DATE`.

    A tokenizer without a chat template gets the plain prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        chat_template=_PINNED + tokenizer.get_chat_template(),
        date_string=DATE,
    )


def token_ids(tokenizer: Any, tasks: Sequence[Task]) -> list[list[int]]:
    """The prompts as token ids, in the model's chat format.

    Args:
        tokenizer: The model's own.
        tasks: One prompt each.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    texts = [chat(tokenizer, task.prompt) for task in tasks]
    return [tokenizer(text, add_special_tokens=not has_template)["input_ids"] for text in texts]


def encode(model: Any, tokenizer: Any, tasks: Sequence[Task], new_tokens: int) -> list[list[int]]:
    """The prompts as token ids.

    Args:
        model: Its vocabulary and its context are read.
        tokenizer: The model's own.
        tasks: One prompt each.
        new_tokens: Most tokens of an answer.

    Raises:
        StudyError: A prompt and its answer do not fit into the model's context, or the tokenizer
            has tokens that the model has not.
    """
    ids = token_ids(tokenizer, tasks)
    known = model.get_input_embeddings().num_embeddings
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for task, tokens in zip(tasks, ids, strict=True):
        if not tokens:
            raise StudyError(f"the prompt of task {task.id!r} has no tokens. Give it a text.")
        if max(tokens) >= known:
            raise StudyError(
                f"the prompt of task {task.id!r} has the token {max(tokens)}, but the model has "
                f"{known} tokens only: this tokenizer is another model's. Give the model with its "
                "own tokenizer."
            )
        if room is not None and len(tokens) + new_tokens > room:
            raise StudyError(
                f"the prompt of task {task.id!r} has {len(tokens)} tokens and its answer may have "
                f"{new_tokens}, but the model's context holds {room}. Shorten the task, or give a "
                "smaller --max-new-tokens."
            )
    return ids
