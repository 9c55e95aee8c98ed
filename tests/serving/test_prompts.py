"""Log-probabilities of a prompt in vLLM: those of one teacher-forced pass, and of any batch."""

from __future__ import annotations

import torch
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from healpass.integrations.transformers import heal_model
from tests.support.engines import Engine, make_model, prompts, same

#: The first token of a prompt has no log-probability, so the prompt of one token has none.
GIVEN = [prompts()[number] for number in (1, 2, 3, 5, 6, 9, 11)]
ASKED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)


def log_probabilities(engine, given):
    """Of every token but the first, of prompts that arrive at once."""
    tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt in given]
    outputs = engine.llm.generate(tokens, ASKED, use_tqdm=False)
    return [
        [
            row[token].logprob
            for row, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        ]
        for output, prompt in zip(outputs, given, strict=True)
    ]


def alone(engine):
    return [log_probabilities(engine, [prompt])[0] for prompt in GIVEN]


def teacher_forced():
    """The same under `heal_model`."""
    model, found = heal_model(make_model("llama"), precision="exact"), []
    for prompt in GIVEN:
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), use_cache=False).logits[0, :-1]
        rows = torch.ops.heal.log_softmax(logits, -1)
        found.append(rows.gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist())
    return found


def test_exact_has_the_bits_of_transformers_and_of_a_batch(llama):
    with Engine(llama) as engine:
        expected = alone(engine)
        assert log_probabilities(engine, GIVEN) == expected
    # Chunks of a prompt give its log-probabilities piece by piece.
    with Engine(llama, arguments={"max_num_batched_tokens": 16, "max_num_seqs": 16}) as engine:
        assert log_probabilities(engine, GIVEN) == expected
    assert expected == teacher_forced()


def test_the_default_precision_has_not(llama):
    """The inverse: other sums in other batches, and in another engine."""
    with Engine(llama, "heal") as engine:
        lonely = alone(engine)
        found = same(log_probabilities(engine, GIVEN), lonely)
    print(f"heal in a batch: {found} of {len(GIVEN)}")
    assert found < len(GIVEN)
    assert lonely != teacher_forced()
