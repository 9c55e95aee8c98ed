"""What a vLLM engine asks of HEAL, and what is refused: without vLLM."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from healpass.errors import ConfigError, UnavailableError
from healpass.integrations.vllm import command_line, engine_args
from healpass.integrations.vllm.options import (
    BACKEND,
    EAGER,
    ROTARY,
    SAME_BITS,
    SEEDS,
    EngineOptions,
    asked,
    check,
    rotary_kinds,
)

#: A compiled engine needs it.
PLAIN = {"VLLM_USE_AOT_COMPILE": "0"}


def engine(**changes: Any) -> Any:
    """A `VllmConfig` as `engine_args` makes it; `changes` by `part.name`."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {
            "quantization": "heal", "dtype": "torch.float32", "architecture": "LlamaForCausalLM",
            "use_mla": False, "is_encoder_decoder": False, "logits_processors": [SEEDS],
        },
        "cache_config": {"cache_dtype": "auto"},
        "attention_config": {"backend": SimpleNamespace(name="CUSTOM")},
        "parallel_config": {"decode_context_parallel_size": 1},
        "compilation_config": {"mode": 2, "backend": BACKEND, "custom_ops": ["none"]},
    }  # fmt: skip
    whole = {
        "additional_config": {"heal": {"precision": "exact"}},
        "lora_config": None,
        "kv_transfer_config": None,
        "speculative_config": None,
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            parts[part][field] = value
        else:
            whole[part] = value
    made = {name: SimpleNamespace(**fields) for name, fields in parts.items()}
    return SimpleNamespace(**whole, **made)


@pytest.mark.filterwarnings("error")
def test_an_engine_as_the_helper_makes_it_is_accepted():
    check(engine(), PLAIN)
    check(engine(), PLAIN | {"VLLM_BATCH_INVARIANT": "0"})
    eager = {"compilation_config__mode": 0, "compilation_config__backend": "inductor"}
    for family in EAGER:
        check(engine(**eager, model_config__architecture=family), {})
    for family in SAME_BITS:
        check(engine(model_config__architecture=family), PLAIN)
    draft = SimpleNamespace(method="ngram")
    check(engine(speculative_config=draft, model_config__logits_processors=None), PLAIN)


def test_a_family_that_nobody_has_compared_is_said():
    cohere = {"model_config__architecture": "CohereForCausalLM"}
    with pytest.warns(UserWarning, match="every bit of CohereForCausalLM"):
        check(engine(**cohere), PLAIN)
    with warnings.catch_warnings(action="error"):
        check(engine(**cohere, additional_config={"heal": {"precision": "heal"}}), PLAIN)


@pytest.mark.parametrize(("changes", "word"), [
    ({"model_config__dtype": "torch.bfloat16"}, "dtype='bfloat16'"),
    ({"model_config__use_mla": True}, "latent attention"),
    ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
    ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
    ({"compilation_config__mode": 3}, "mode=3"),
    ({"compilation_config__backend": "inductor"}, "backend='inductor'"),
    ({"compilation_config__custom_ops": ["all"]}, "custom_ops=['all']"),
    ({"attention_config__backend": SimpleNamespace(name="FLEX_ATTENTION")}, "FLEX_ATTENTION"),
    ({"attention_config__backend": None}, "attention_backend=None"),
    (
        {
            "compilation_config__mode": 0,
            "model_config__hf_text_config": SimpleNamespace(llama_4_scaling={"beta": 0.1}),
        },
        "llama_4_scaling",
    ),
    ({"lora_config": object()}, "LoRA"),
    ({"kv_transfer_config": object()}, "kv_transfer_config"),
    ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
    (
        {
            "speculative_config": SimpleNamespace(method="eagle"),
            "model_config__logits_processors": None,
        },
        "'eagle'",
    ),
    ({"model_config__logits_processors": [SEEDS, "mine:Mine"]}, "mine:Mine"),
    ({"model_config__logits_processors": None}, "logits_processors=[]"),
    ({"model_config__logprobs_mode": "processed_logprobs"}, "processed_logprobs"),
    ({"model_config__is_multimodal_model": True}, "multimodal"),
    ({"model_config__runner_type": "pooling"}, "pooling"),
    ({"model_config__head_dtype": "torch.bfloat16"}, "head_dtype='bfloat16'"),
    ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
    (
        {"compilation_config__mode": 0, "model_config__architecture": "PhiForCausalLM"},
        "PhiForCausalLM",
    ),
])  # fmt: skip
def test_what_would_give_other_bits_is_refused(changes, word):
    with pytest.raises(UnavailableError) as refused:
        check(engine(**changes), PLAIN)
    first = str(refused.value).splitlines()[0]
    assert word in first
    assert "engine_args" in str(refused.value)


@pytest.mark.parametrize(("given", "kinds"), [
    (None, set()),
    ({}, set()),
    ({"rope_theta": 1e4}, {"default"}),
    ({"rope_type": "llama3", "factor": 8.0}, {"llama3"}),
    ({"type": "linear"}, {"linear"}),
    ({"type": "longrope"}, {"longrope"}),
    ({"rope_type": "dynamic", "alpha": 3.0}, {"dynamic", "alpha"}),
    ({"rope_type": "default", "mrope_section": [8, 12, 12]}, {"default", "mrope_section"}),
    ({"full": {"rope_type": "yarn"}, "sliding": {"rope_theta": 1e4}}, {"yarn", "default"}),
])  # fmt: skip
def test_rotary_scalings_that_are_not_pinned_are_refused(given, kinds):
    config = SimpleNamespace(rope_parameters=given, max_position_embeddings=64)
    assert rotary_kinds(config) == kinds
    scaled = engine(model_config__hf_text_config=config, model_config__max_model_len=64)
    if kinds <= set(ROTARY):
        return check(scaled, PLAIN)
    with pytest.raises(UnavailableError, match=r"'longrope'|'mrope_section'|'alpha'"):
        check(scaled, PLAIN)
    other = {"heal": {"precision": "heal"}}  # FP32's accuracy, whoever made the table
    return check(engine(model_config__hf_text_config=config, additional_config=other), PLAIN)


def test_a_dynamic_scaling_that_would_begin_is_refused():
    config = SimpleNamespace(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=64
    )
    given = {"model_config__hf_text_config": config}
    check(engine(**given, model_config__max_model_len=64), PLAIN)
    with pytest.raises(UnavailableError, match="Use max_model_len=64"):
        check(engine(**given, model_config__max_model_len=65), PLAIN)


def test_every_reason_is_named_at_once():
    with pytest.raises(UnavailableError) as refused:
        check(engine(model_config__dtype="torch.float16", lora_config=object()), {
            "VLLM_BATCH_INVARIANT": "1",
        })  # fmt: skip
    words = ("float16", "LoRA", "VLLM_BATCH_INVARIANT", "VLLM_USE_AOT_COMPILE=0")
    assert all(word in str(refused.value) for word in words)


def test_an_engine_that_does_not_ask_is_left_alone():
    assert asked(None) is None
    assert asked(engine(model_config__quantization=None)) is None
    assert asked(engine(additional_config=None)) == EngineOptions.read(None)


@pytest.mark.parametrize(("given", "word"), [
    ({"precisions": "exact"}, "'precision'"),
    ({"precision": "exakt"}, "'exact'"),
    ({"precision": "bf16"}, "leave the model as it is"),
    ({"precision": "layercast", "kv": "fp32"}, "int24"),
    ({"outputs": "fp32"}, "takes precision"),
    ({"exact_accuracy": "high"}, "precision='exact'"),
])  # fmt: skip
def test_options_are_strict(given, word):
    with pytest.raises(ConfigError) as refused:
        engine_args("model", **given)
    assert word in str(refused.value)
    with pytest.raises(ConfigError):
        asked(engine(additional_config={"heal": given}))


def test_pages_have_a_format_for_every_precision():
    formats = {name: EngineOptions.read({"precision": name}).kv for name in ("heal", "exact")}
    assert formats == {"heal": "int16", "exact": "int16"}
    assert EngineOptions.read({"precision": "layercast"}).kv == "int24"
    assert EngineOptions.read({"precision": "exact", "kv": "int24"}).kv == "int24"
    assert EngineOptions.read({"precision": "exact", "exact_accuracy": "low"}).numerics == "exact3"


def test_arguments_of_an_engine():
    found = engine_args(
        "model", precision="exact", engine={"max_model_len": 64, "dtype": "float32"}
    )
    assert found == {
        "model": "model",
        "dtype": "float32",
        "quantization": "heal",
        "additional_config": {"heal": {"precision": "exact"}},
        "attention_backend": "CUSTOM",
        "logits_processors": [SEEDS],
        "compilation_config": {"mode": 2, "backend": BACKEND, "custom_ops": ["none"]},
        "max_model_len": 64,
    }
    assert engine_args("model", compiled=False)["enforce_eager"] is True
    drafts = {"speculative_config": {"method": "ngram"}}
    assert "logits_processors" not in engine_args("model", engine=drafts)
    with pytest.raises(ConfigError, match="dtype='bfloat16' contradicts"):
        engine_args("model", engine={"dtype": "bfloat16"})


def test_the_same_as_words_of_a_command():
    words = command_line("model", precision="exact", kv="int24")
    assert words[:7] == ["vllm", "serve", "model", "--dtype", "float32", "--quantization", "heal"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert json.loads(flags["--additional-config"]) == {
        "heal": {"precision": "exact", "kv": "int24"}
    }
    assert json.loads(flags["--compilation-config"])["backend"] == BACKEND
    assert "--enforce-eager" in command_line("model", compiled=False)
