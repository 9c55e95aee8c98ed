"""`SeededSampler` in `generate`: one answer per prompt and seed."""

from __future__ import annotations

import pytest
import torch

from healpass.errors import OperandError
from healpass.integrations.sampling import SeededSampler
from healpass.integrations.transformers import heal_model
from tests.support.tiny_llama import make_llama

PROMPTS = torch.tensor([[5, 9, 2, 44, 7], [0, 0, 13, 8, 91], [0, 3, 3, 60, 1]])
HOW = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01}


# In FP64 what another order of sums changes is far below what decides a draw.
MODELS = {
    "fp64": lambda: make_llama(torch.float64),
    "exact": lambda: heal_model(make_llama(), precision="exact"),
}


def answers(model, rows, seed, **more):
    given = PROMPTS[rows]
    first = int((given != 0).any(0).nonzero()[0])  # no padding that all rows have
    given = given[:, first:]
    output = model.generate(
        given, attention_mask=(given != 0).long(), do_sample=False, max_new_tokens=8,
        logits_processor=[SeededSampler(seed, **HOW)], **more,
    )  # fmt: skip
    return output[:, given.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["fp64", pytest.param("exact", marks=pytest.mark.deep)])
def test_a_prompt_has_one_answer_in_any_batch_and_cache(name):
    llama = MODELS[name]()
    together = answers(llama, [0, 1, 2], [7, 8, 9])
    for row, seed in enumerate((7, 8, 9)):
        assert answers(llama, [row], seed) == [together[row]]
    assert answers(llama, [2, 0], [9, 7]) == [together[2], together[0]]
    assert answers(llama, [0, 1, 2], [7, 8, 9], cache_implementation="static") == together
    assert answers(llama, [0, 1, 2], [17, 18, 19]) != together


def test_rows_and_calls_that_do_not_fit_are_refused():
    sampler = SeededSampler([1, 2])
    with pytest.raises(OperandError, match="3 rows, and 2 seeds"):
        sampler(PROMPTS, torch.zeros(3, 50))
    sampler(PROMPTS[:2], torch.zeros(2, 50))
    with pytest.raises(OperandError, match="for each call"):
        sampler(PROMPTS[:2], torch.zeros(2, 50))
    with pytest.raises(OperandError, match="top_p"):
        SeededSampler(1, top_p=0.0)
