"""An answer of vLLM has the bits of the same model under `heal_model` in transformers."""

from __future__ import annotations

import functools

import pytest
import torch

from healpass.integrations.sampling import SeededSampler
from healpass.integrations.transformers import heal_model
from healpass.integrations.vllm import gemma, layers, quant
from healpass.integrations.vllm.experts import HealExpertsMethod, route
from tests.support.engines import (
    COMPILED,
    NEW,
    ROPES,
    SAME_AS_TRANSFORMERS,
    Engine,
    make_model,
    prompts,
    rope,
    save_model,
)

GIVEN = prompts()[5:9]


@functools.cache
def trainer(family: str):
    """The family's model in transformers; compiled once for all that asks it."""
    return heal_model(make_model(family), precision="exact")


def teacher_forced(family, prompt, tokens):
    """Log-probabilities of an answer's tokens, by the model in transformers."""
    ids = torch.tensor([prompt + list(tokens)])
    with torch.no_grad():
        logits = trainer(family)(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    rows = torch.ops.heal.log_softmax(logits, -1)
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def equal(family, answers):
    """How many answers have the log-probabilities of the model in transformers."""
    found = 0
    for prompt, (tokens, log_probabilities) in zip(GIVEN, answers, strict=True):
        assert len(tokens) == NEW
        found += list(log_probabilities) == teacher_forced(family, prompt, tokens)
    return found


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_windows_and_experts_in_batches_and_chunks(tmp_path, family):
    model, given = save_model(family, tmp_path), prompts()
    with Engine(model) as engine:
        alone = engine.alone(given)
        assert engine.llm.reset_prefix_cache()
        assert engine.together(given) == alone
    with Engine(model, arguments={"max_num_batched_tokens": 16, "max_num_seqs": 16}) as engine:
        assert engine.together(given) == alone


@pytest.mark.parametrize("family", [*SAME_AS_TRANSFORMERS, *map(rope, ROPES)])
def test_teacher_forced_log_probabilities_are_the_rollouts(tmp_path, family):
    """The importance ratio of a rollout is exactly 1: the log-probabilities are equal."""
    with Engine(save_model(family, tmp_path), compiled=family in COMPILED) as engine:
        assert equal(family, engine.together(GIVEN)) == len(GIVEN)


@pytest.mark.parametrize("chosen_first", [False, True])
def test_the_router_takes_the_lowest_of_equals(chosen_first):
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    weights, chosen = route(scores, 2, True, chosen_first)
    assert chosen.tolist() == [[1, 2], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_a_dynamic_scaling_is_none_up_to_the_trained_length(tmp_path):
    """Transformers decides on it while the model runs, which `exact` refuses there."""
    with Engine(save_model(rope("dynamic"), tmp_path)) as engine:
        assert equal(rope("default"), engine.together(GIVEN)) == len(GIVEN)


@pytest.mark.parametrize(("family", "owner", "name", "fault"), [
    ("gemma2", gemma, "stored_dtype", lambda default: default),
    (rope("linear"), layers.HealLinearRotaryEmbedding, "table", layers.PinnedTables.table),
    ("mixtral", quant, "HealExpertsMethod", lambda layer, dtype, _: HealExpertsMethod(
        layer, dtype, "heal")),
])  # fmt: skip
def test_a_planted_fault_is_another_answer(tmp_path, monkeypatch, family, owner, name, fault):
    """The inverse: a factor, a table, a product as vLLM or `heal` would have them."""
    monkeypatch.setattr(owner, name, fault)
    with Engine(save_model(family, tmp_path)) as engine:
        assert equal(family, engine.together(GIVEN)) < len(GIVEN)


def test_seeded_rollouts_are_those_of_transformers(tmp_path):
    """The same tokens for the same seeds, and their log-probabilities."""
    how = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    with Engine(save_model("llama", tmp_path), sampling=how) as engine:
        answers = engine.together(GIVEN)
    model = trainer("llama")
    for number, (prompt, (tokens, _)) in enumerate(zip(GIVEN, answers, strict=True)):
        sampler = SeededSampler(100 + number, **how)
        output = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, logits_processor=[sampler]
        )
        assert output[0, len(prompt) :].tolist() == list(tokens)
