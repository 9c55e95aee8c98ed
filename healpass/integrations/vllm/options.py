"""What a vLLM engine asked of HEAL, and what it has to be for it. Imports `config` and `errors`.

An engine is refused at start-up, with the reason and the way out, where some of it would compute
with other arithmetic than it asked for: that it runs proves that HEAL is on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from healpass.config import HealConfig
from healpass.errors import ConfigError, UnavailableError, suggestion

#: Where vLLM finds the compiler: `CompilationConfig.backend`.
BACKEND = "healpass.integrations.vllm.compiled.backend"
#: Where vLLM finds what draws for seeded requests: `ModelConfig.logits_processors`.
SEEDS = "healpass.integrations.vllm.seeds:SeededDraws"
#: The fields of `HealConfig` that an engine may give.
FIELDS = ("precision", "kv", "exact_accuracy", "exact_products")
#: Families whose every layer has the bits of `exact` without a compiler, too.
EAGER = (
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM", "LlamaForCausalLM"),
    *("MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM"),
    *("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
)
#: Families whose bits are those of `heal_model` in transformers, as the tests show.
SAME_BITS = (*EAGER, "Qwen2MoeForCausalLM")
#: Scalings of rotary embeddings whose tables are pinned (`layers.PinnedTables`).
ROTARY = ("default", "linear", "dynamic", "llama3", "yarn")
#: Parameters beside the type that ask for another table.
OTHER_ROTARY = ("mrope_section", "use_fope", "alpha", "max_trained_positions")
#: `CompilationMode`: no compiler, and one whole graph by torch.compile.
NO_COMPILER, WHOLE_GRAPH = 0, 2


@dataclass(frozen=True)
class EngineOptions:
    """`additional_config["heal"]`.

    Attributes:
        config: The fields that were given, the others at their default.
    """

    config: HealConfig

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> EngineOptions:
        """Check what was given.

        Args:
            given: Some of `FIELDS`.

        Raises:
            ConfigError: Another name, a wrong value, or one that no engine can have.
        """
        for name in given or {}:
            if name not in FIELDS:
                raise ConfigError(
                    f"unknown option {name!r} of HEAL in vLLM.{suggestion(str(name), FIELDS)}\n"
                    f"additional_config={{'heal': {{...}}}} takes {', '.join(FIELDS)}."
                )
        config = HealConfig.read(given)
        if not config.rewrites:
            raise ConfigError(
                f"precision={config.precision!r} asks HEAL to leave the model as it is.\n"
                "Leave out quantization='heal', or use precision='heal', 'layercast' or 'exact'."
            )
        if config.kv == "fp32":
            raise ConfigError(
                "kv='fp32': HEAL's pages in vLLM hold integers.\n"
                "Use kv='int16', or kv='int24', whose results are FP32-equivalent."
            )
        return cls(config)

    @property
    def kv(self) -> str:
        """Format of the pages: `int24` for `layercast`, which asks for FP32's accuracy."""
        return self.config.kv or ("int24" if self.config.precision == "layercast" else "int16")

    @property
    def numerics(self) -> str:
        """As the `heal::` operators take it."""
        return self.config.numerics

    @property
    def is_exact(self) -> bool:
        """Whether bits have to repeat."""
        return self.config.precision == "exact"

    @property
    def given(self) -> dict[str, Any]:
        """What JSON knows of it: vLLM hashes that."""
        return {"precision": self.config.precision, **self.config.changed()}

    def joined(self, ours: dict[str, Any], engine: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of an engine, HEAL's and the user's.

        Args:
            ours: What HEAL needs.
            engine: What the user gives beside.

        Raises:
            ConfigError: One of them has two values.
        """
        for name, value in engine.items():
            if name in ours and ours[name] != value:
                raise ConfigError(
                    f"{name}={value!r} contradicts what HEAL needs in vLLM, {ours[name]!r}.\n"
                    f"Leave {name} out of engine=."
                )
        return {**ours, **engine}


def asked(engine: Any) -> EngineOptions | None:
    """What an engine asks for; None where it does not ask for HEAL.

    Args:
        engine: A `VllmConfig`.

    Raises:
        ConfigError: It asks for what cannot be.
    """
    if engine is None or getattr(engine.model_config, "quantization", None) != "heal":
        return None
    return EngineOptions.read((engine.additional_config or {}).get("heal"))


def current() -> EngineOptions | None:
    """What the engine that is being built here asks for."""
    from vllm.config import get_current_vllm_config_or_none

    return asked(get_current_vllm_config_or_none())


def check(engine: Any, environment: Mapping[str, str]) -> None:
    """Refuse an engine that would not compute as it asked; warn of bits that have no other side.

    Args:
        engine: A `VllmConfig` that asks for HEAL.
        environment: The process's.

    Raises:
        UnavailableError: With every reason, and the way out of each.
    """
    found = [*_model_reasons(engine), *_engine_reasons(engine, environment)]
    if found:
        lines = "\n".join(f"- {reason}" for reason in found)
        raise UnavailableError(
            f"quantization='heal' cannot run this engine: {found[0]}\n{lines}\n"
            "healpass.integrations.vllm.engine_args(model, precision=...) gives the arguments "
            "that an engine needs."
        )
    options, family = asked(engine), engine.model_config.architecture
    if options is not None and options.is_exact and family not in SAME_BITS:
        warnings.warn(
            f"precision='exact' repeats every bit of {family} in vLLM; that they are the bits of "
            f"heal_model in transformers is shown for {', '.join(SAME_BITS)} only.",
            stacklevel=2,
        )


def _model_reasons(engine: Any) -> Iterator[str]:
    model, options = engine.model_config, asked(engine)
    if str(model.dtype) != "torch.float32":
        yield (
            f"dtype={str(model.dtype).removeprefix('torch.')!r}: HEAL computes between layers in "
            "FP32, and keeps weights in the checkpoint's dtype. Use dtype='float32'."
        )
    if getattr(model, "use_mla", False):
        yield "multi-head latent attention keeps no keys and values that pages could hold."
    if getattr(model, "is_encoder_decoder", False):
        yield "encoder-decoder models attend to what is no page. Use heal_model in transformers."
    if engine.cache_config.cache_dtype != "auto":
        yield (
            f"kv_cache_dtype={engine.cache_config.cache_dtype!r}: the format of HEAL's pages is "
            "additional_config['heal']['kv']. Leave kv_cache_dtype out."
        )
    mode = getattr(model, "logprobs_mode", "raw_logprobs")
    if mode.startswith("processed"):
        yield f"logprobs_mode={mode!r} is taken elsewhere. Use 'raw_logprobs' or 'raw_logits'."
    if options is not None and options.is_exact:
        yield from _exact_reasons(model)


def _exact_reasons(model: Any) -> Iterator[str]:
    """What only bits that have to repeat forbid."""
    if getattr(model, "is_multimodal_model", False):
        yield "the towers of a multimodal model run outside of the graph. Use precision='heal'."
    if getattr(model, "runner_type", "generate") == "pooling":
        yield "pooling adds floats in an order of its own. Use precision='heal'."
    head = str(getattr(model, "head_dtype", None)).removeprefix("torch.")
    if head not in ("None", "float32"):
        yield f"head_dtype={head!r}: logits are FP32. Leave head_dtype out."
    text = getattr(model, "hf_text_config", None)
    kinds, trained = rotary_kinds(text), getattr(text, "max_position_embeddings", 0)
    if "dynamic" in kinds and model.max_model_len > trained:
        yield (
            f"rotary embeddings of type 'dynamic' change with a request's length beyond {trained} "
            f"tokens, and max_model_len={model.max_model_len}. Use max_model_len={trained}."
        )
    for kind in sorted(kinds - set(ROTARY)):
        yield (
            f"rotary embeddings of type {kind!r}: exact has pinned tables for "
            f"{', '.join(ROTARY)}. Use precision='heal', or heal_model in transformers."
        )


def rotary_kinds(config: Any) -> set[str]:
    """The types of scaling that a model's configuration names, one for each kind of layer.

    Args:
        config: transformers' configuration of the text model, or None.
    """
    if getattr(config, "dual_chunk_attention_config", None):
        return {"dual chunk"}
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = given.values() if all(isinstance(v, dict) for v in given.values()) else [given]
    found = set()
    for kind in kinds:
        found.add(str(kind.get("rope_type", kind.get("type", "default"))))
        found |= {key for key in OTHER_ROTARY if kind.get(key)}
    return found


def _engine_reasons(engine: Any, environment: Mapping[str, str]) -> Iterator[str]:
    yield from _compiler_reasons(engine, environment)
    if environment.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        yield "VLLM_BATCH_INVARIANT replaces operators for its own. Unset it: exact needs none."
    backend = getattr(engine.attention_config.backend, "name", engine.attention_config.backend)
    if backend != "CUSTOM":
        yield f"attention_backend={backend!r} is not over HEAL's pages. Use 'CUSTOM'."
    if engine.lora_config is not None:
        yield "LoRA adds products of its own to each layer. Merge the adapter into the model."
    if engine.kv_transfer_config is not None:
        yield "kv_transfer_config: a store outside does not know the format of the pages."
    if engine.parallel_config.decode_context_parallel_size > 1:
        yield "decode context parallelism splits a request's keys. Use tensor parallelism."
    yield from _sampling_reasons(engine)


def _sampling_reasons(engine: Any) -> Iterator[str]:
    if getattr(engine, "use_v2_model_runner", False):
        yield "model runner V2 has a sampler of its own. Set VLLM_USE_V2_MODEL_RUNNER=0."
    speculative = engine.speculative_config
    processors = getattr(engine.model_config, "logits_processors", None) or []
    if list(map(str, processors)) != ([] if speculative is not None else [SEEDS]):
        yield (
            f"logits_processors={processors}: seeded requests draw in one of HEAL's, after which "
            f"no other may come, and drafts take none. Use [{SEEDS!r}], or none with drafts."
        )
    if speculative is not None and speculative.method != "ngram":
        yield f"speculative method {speculative.method!r} runs a model of its own. Use 'ngram'."


def _compiler_reasons(engine: Any, environment: Mapping[str, str]) -> Iterator[str]:
    compilation, family = engine.compilation_config, engine.model_config.architecture
    mode = int(compilation.mode or 0)
    if mode == NO_COMPILER:
        options, text = asked(engine), getattr(engine.model_config, "hf_text_config", None)
        if options is None or not options.is_exact:
            return
        if family not in EAGER:
            yield (
                f"enforce_eager with precision='exact' knows the layers of {', '.join(EAGER)}, "
                f"not of {family}. Leave enforce_eager out."
            )
        if getattr(text, "llama_4_scaling", None):
            yield "llama_4_scaling takes a logarithm outside of layers. Leave enforce_eager out."
        return
    if environment.get("VLLM_USE_AOT_COMPILE") != "0":
        yield (
            "torch's AOT artifacts do not know which version of HEAL made them. Set "
            "VLLM_USE_AOT_COMPILE=0; a second start is faster, too."
        )
    found = (mode, compilation.backend, compilation.custom_ops)
    if found != (WHOLE_GRAPH, BACKEND, ["none"]):
        yield (
            f"compilation mode={mode}, backend={compilation.backend!r}, custom_ops="
            f"{compilation.custom_ops}: HEAL compiles the whole graph itself. Use mode "
            f"{WHOLE_GRAPH}, backend {BACKEND!r} and custom_ops ['none'], or enforce_eager."
        )
