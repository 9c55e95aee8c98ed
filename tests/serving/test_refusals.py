"""Engines that would not compute as they ask do not start: one clear error each."""

from __future__ import annotations

import pytest
from vllm import LLM

from healpass.errors import ConfigError, UnavailableError
from healpass.integrations.vllm import engine_args
from tests.support.engines import Engine, save_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("llama"))


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
    model, options = save_model("mixtral", tmp_path), {"heal": {"precision": "heal"}}
    with pytest.raises(UnavailableError, match="is a RoutedExperts"):
        start(model, additional_config=options)


def test_another_engine_in_the_same_process(llama):
    """vLLM keeps the attention backend of the first: the second says so, or is vLLM's own."""
    with Engine(llama):
        pass
    with pytest.raises(UnavailableError, match="its own process"):
        start(llama, additional_config={"heal": {"precision": "exact", "kv": "int24"}})
    with pytest.raises(UnavailableError, match="its own process"):
        LLM(
            model=llama, dtype="float32", enforce_eager=True, max_model_len=64,
            skip_tokenizer_init=True,
        )  # fmt: skip
