"""The whole of SmolLM2: 20 questions, 128 tokens each, in vLLM and in transformers.

What a user runs: compiled engines and models. An answer's log-probabilities are those of one
teacher-forced pass, and its tokens those of `generate` with a HealCache.
"""

from __future__ import annotations

import pytest
import torch

from healpass.integrations import smollm2
from healpass.integrations.transformers import heal_model
from tests.support.engines import Engine, same

pytestmark = pytest.mark.model
NEW, GENERATED = 128, 2
SUBJECTS = (
    *("glass", "rivers that run north", "the number 7", "sleep and what it is for", "rust"),
    *("how bread rises in a cold kitchen", "comets", "maps of cities that are gone", "trust"),
    "a game of chess between two people who have never met and write one letter a year",
)
QUESTIONS = [
    text for x in SUBJECTS for text in (f"What is known about {x}?", f"Write a story of {x}.")
]


@pytest.fixture(scope="module")
def model():
    """The model of transformers, and the folder that vLLM loads."""
    folder = smollm2.fetch()
    return smollm2.load()[0], str(folder)


@pytest.fixture(scope="module")
def given():
    """The questions as the chat template has them, in tokens: of several lengths."""
    _, tokenizer = smollm2.load()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    tokens = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
    assert len({len(prompt) for prompt in tokens}) > 2
    return tokens


def answers(folder, given, precision):
    """Of a compiled engine, to all at once."""
    arguments = {"max_model_len": 512, "max_num_seqs": len(given)}
    asked = {"max_tokens": NEW}
    with Engine(folder, precision, None, True, asked, arguments) as engine:
        return engine.together(given)


@torch.no_grad()
def teacher_forced(model, prompt, tokens):
    """Log-probabilities of an answer's tokens, in one pass."""
    ids = torch.tensor([prompt + list(tokens)])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    rows = torch.ops.heal.log_softmax(logits, -1)
    return tuple(rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist())


def test_tokens_and_log_probabilities_are_those_of_transformers(model, given):
    trained, folder = model
    found = answers(folder, given, "exact")
    trained = heal_model(trained, precision="exact")
    assert [len(tokens) for tokens, _ in found] == [NEW] * len(given)
    expected = [
        (tokens, teacher_forced(trained, prompt, tokens))
        for prompt, (tokens, _) in zip(given, found, strict=True)
    ]
    print(f"exact: {same(found, expected)} of {len(given)} answers of {NEW} tokens")
    assert found == expected
    for prompt, (tokens, _) in list(zip(given, found, strict=True))[:GENERATED]:
        ids = torch.tensor([prompt])
        generated = trained.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
            do_sample=False,
        )  # fmt: skip
        # vLLM goes on after an end of text, generate takes the next best token until it may end.
        stop = trained.generation_config.eos_token_id
        until = tokens.index(stop) if stop in tokens else NEW
        assert generated[0, len(prompt) :].tolist()[:until] == list(tokens)[:until]


def test_the_default_precision_differs(model, given):
    """The inverse: FP32-equivalent sums, in another order in each engine."""
    _, folder = model
    trained = heal_model(smollm2.load()[0], precision="exact")
    found = answers(folder, given[:4], "heal")
    expected = [
        (tokens, teacher_forced(trained, prompt, tokens))
        for prompt, (tokens, _) in zip(given, found, strict=False)
    ]
    print(f"heal: {same(found, expected)} of 4 answers")
    assert same(found, expected) == 0
