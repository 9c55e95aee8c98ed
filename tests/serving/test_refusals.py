"""Engines that would not compute as they ask do not start: one clear error each."""

from __future__ import annotations

import pytest
from vllm import LLM

from healpass.errors import ConfigError, UnavailableError
from healpass.integrations.vllm import engine_args
from healpass.integrations.vllm.layers import LAYERS
from tests.support.engines import elsewhere, save_model


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


@pytest.mark.parametrize(("family", "word"), [("phi3", "Phi3ForCausalLM"), ("mixtral", "Mixtral")])
def test_families_whose_layers_are_not_covered(tmp_path, family, word):
    with pytest.raises(UnavailableError, match=word):
        start(save_model(family, tmp_path))


def test_experts_are_refused_by_the_layer(tmp_path):
    """In a process of its own: vLLM makes the ranks of experts once."""
    with pytest.raises(AssertionError, match="is a RoutedExperts"):
        elsewhere(save_model("mixtral", tmp_path), {}, precision="heal")


def test_a_head_that_is_not_heals(tmp_path):
    """vLLM builds Gemma 2's embedding, which is its head, without the quantization."""
    given = engine_args(save_model("gemma2", tmp_path), precision="exact")
    with pytest.raises(UnavailableError, match="UnquantizedEmbeddingMethod"):
        LLM(**given, max_model_len=64, skip_tokenizer_init=True)


def test_layers_have_the_names_that_switch_them():
    """`custom_ops` goes on meaning vLLM's layers, in other engines, too."""
    for theirs, ours in LAYERS.items():
        assert ours.name == theirs.name
