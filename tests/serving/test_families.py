"""An answer of vLLM has the bits of the same model under `heal_model` in transformers."""

from __future__ import annotations

import pytest
import torch

from healpass.integrations.sampling import SeededSampler
from healpass.integrations.transformers import heal_model
from tests.support.engines import (
    COMPILED,
    NEW,
    ROPES,
    SAME_AS_TRANSFORMERS,
    Engine,
    make_model,
    prompts,
    save_model,
)

GIVEN = prompts()[5:9]


def test_a_sliding_window_in_batches_and_chunks(tmp_path):
    model, given = save_model("mistral", tmp_path), prompts()
    with Engine(model) as engine:
        alone = engine.alone(given)
        assert engine.llm.reset_prefix_cache()
        assert engine.together(given) == alone
    with Engine(model, arguments={"max_num_batched_tokens": 16, "max_num_seqs": 16}) as engine:
        assert engine.together(given) == alone


@pytest.mark.parametrize("family", [*SAME_AS_TRANSFORMERS, *(f"rope {kind}" for kind in ROPES)])
def test_teacher_forced_log_probabilities_are_the_rollouts(tmp_path, family):
    """The importance ratio of a rollout is exactly 1: the log-probabilities are equal."""
    with Engine(save_model(family, tmp_path), compiled=family in COMPILED) as engine:
        answers = engine.together(GIVEN)
    model = heal_model(make_model(family), precision="exact")
    for prompt, (tokens, log_probabilities) in zip(GIVEN, answers, strict=True):
        ids = torch.tensor([prompt + list(tokens)])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows = torch.ops.heal.log_softmax(logits, -1)
        expected = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        assert len(expected) == NEW
        assert list(log_probabilities) == expected


def test_seeded_rollouts_are_those_of_transformers(tmp_path):
    """The same tokens for the same seeds, and their log-probabilities."""
    how = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    with Engine(save_model("llama", tmp_path), sampling=how) as engine:
        answers = engine.together(GIVEN)
    model = heal_model(make_model("llama"), precision="exact")
    for number, (prompt, (tokens, _)) in enumerate(zip(GIVEN, answers, strict=True)):
        sampler = SeededSampler(100 + number, **how)
        output = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, logits_processor=[sampler]
        )
        assert output[0, len(prompt) :].tolist() == list(tokens)
