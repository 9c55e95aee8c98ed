"""Engines that would not compute as they ask do not start: one clear error each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm import LLM
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from healpass.errors import ConfigError, UnavailableError
from healpass.integrations.vllm import engine_args
from healpass.integrations.vllm.experts import HealExpertsMethod, reasons
from healpass.integrations.vllm.layers import LAYERS
from tests.support.engines import save_model


def start(model, **changes):
    common = {"max_model_len": 64, "skip_tokenizer_init": True}
    given = engine_args(model, precision="exact", compiled=False) | common
    return LLM(**given | changes)


@pytest.mark.parametrize(("changes", "error", "word"), [
    ({"dtype": "bfloat16"}, ValueError, "float32"),
    ({"additional_config": {"heal": {"precisions": "exact"}}}, ConfigError, "'precision'"),
    ({"additional_config": {"heal": {"kv": "fp32"}}}, ConfigError, "int24"),
    ({"enforce_eager": False}, UnavailableError, "backend='inductor'"),
    (
        {"enforce_eager": False, "compilation_config": {"mode": 3}},
        UnavailableError,
        "backend='inductor'",
    ),
    ({"logits_processors": None}, UnavailableError, "SeededDraws"),
    ({"logprobs_mode": "processed_logprobs"}, UnavailableError, "processed_logprobs"),
    ({"kv_cache_dtype": "fp8"}, (ValueError, UnavailableError), "kv_cache_dtype|fp8"),
])  # fmt: skip
def test_an_engine_that_asks_for_something_else(llama, changes, error, word):
    with pytest.raises(error, match=word):
        start(llama, **changes)


def test_vllms_own_invariance_at_the_same_time(llama, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UnavailableError, match="VLLM_BATCH_INVARIANT"):
        start(llama)


def test_a_family_whose_norms_are_no_layers(tmp_path):
    with pytest.raises(UnavailableError, match="CohereForCausalLM"):
        start(save_model("cohere", tmp_path))


def test_a_head_in_another_dtype(llama):
    with pytest.raises(UnavailableError, match="head_dtype='bfloat16'"):
        start(llama, hf_overrides={"head_dtype": "bfloat16"})


@pytest.mark.parametrize(("rope", "word"), [
    ({"rope_type": "dynamic", "factor": 3.0}, "Use max_model_len=512"),
    ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 32,
      "long_factor": [2.0] * 32, "original_max_position_embeddings": 256}, "'longrope'"),
    ({"rope_type": "dynamic", "alpha": 3.0}, "'alpha'"),
])  # fmt: skip
def test_tables_that_are_not_pinned(llama, rope, word):
    given = {"rope_parameters": {"rope_theta": 1e4} | rope}
    with pytest.raises(UnavailableError, match=word):
        start(llama, hf_overrides=given, max_model_len=1024 if word.startswith("Use") else 64)


def experts(**changes):
    """A layer of vLLM's, as far as it is asked."""
    ranks = {"tp_size": 1, "ep_size": 1, "dp_size": 1, "enable_eplb": False}
    parallel = SimpleNamespace(**ranks | changes.pop("ranks", {}))
    layer = {
        "moe_config": SimpleNamespace(moe_parallel_config=parallel),
        "layer_name": "model.layers.0.mlp.experts",
        "scoring_func": "softmax",
        "use_grouped_topk": False,
        "custom_routing_function": None,
        "e_score_correction_bias": None,
        "apply_router_weight_on_input": False,
        "routed_scaling_factor": 1.0,
        "activation": MoEActivation.SILU,
        "swiglu_limit": None,
        "swiglu_alpha": None,
    }
    return SimpleNamespace(**layer | changes)


@pytest.mark.parametrize(("changes", "word"), [
    ({"ranks": {"tp_size": 2}}, "Use one rank"),
    ({"ranks": {"enable_eplb": True}}, "Use one rank"),
    ({"scoring_func": "sigmoid"}, "'sigmoid'"),
    ({"use_grouped_topk": True}, "groups of experts"),
    ({"e_score_correction_bias": 0.0}, "correction"),
    ({"routed_scaling_factor": 2.5}, r"2\.5"),
    ({"activation": MoEActivation.RELU2}, "'relu2'"),
    ({"swiglu_limit": 7.0}, "limit of activations"),
])  # fmt: skip
def test_experts_that_are_chosen_otherwise(changes, word):
    with pytest.raises(UnavailableError, match=word):
        HealExpertsMethod(experts(**changes), torch.bfloat16, "exact5")
    assert not list(reasons(experts()))


def test_layers_have_the_names_that_switch_them():
    """`custom_ops` goes on meaning vLLM's layers, in other engines, too."""
    for theirs, ours in LAYERS.items():
        assert ours.name == theirs.name
