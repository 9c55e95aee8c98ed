"""healpass in vLLM: the same tokens and log-probabilities whatever the scheduler does.

    from vllm import LLM
    from healpass.integrations.vllm import engine_args
    llm = LLM(**engine_args("HuggingFaceTB/SmolLM2-135M-Instruct", precision="exact"))

with VLLM_USE_AOT_COMPILE=0 in the environment (`options` says why).

vLLM finds the plugin by its entry point `vllm.general_plugins` and calls `register()` in every
process. That gives names to what an engine may ask for, and changes nothing for an engine that
does not: `quantization="heal"` is the switch. What follows from it::

    options.py     additional_config["heal"], read strictly; what an engine has to be for it
    quant.py       linear layers and embeddings: weights as the checkpoint has them, FP32 between
    experts.py     mixtures of experts: the router's choice, products in groups
    layers.py      norms, activations, rotary tables, the logits' cap
    gemma.py       the factor of Gemma's embeddings
    attention.py   the backend over paged cells (`heal::paged_write`, `heal::paged_attention`)
    compiled.py    the model's graph through backend="heal"
    sampling.py    log-probabilities
    seeds.py       seeded requests: draws that repeat on any device

Imports nothing of vLLM; the modules below do. Imports `config` and `errors`.
"""

from __future__ import annotations

import json
from typing import Any

from healpass.integrations.vllm.options import BACKEND, SEEDS, EngineOptions

__all__ = ["command_line", "engine_args", "register"]

#: Classes of vLLM's quantization and attention registries live in modules that import vLLM.
_HERE = "healpass.integrations.vllm"
#: Models that `gemma` stands in for.
GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")


def engine_args(
    model: str, *, compiled: bool = True, engine: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """The arguments of `vllm.LLM` (and of `AsyncEngineArgs`) that run a model with HEAL.

    Args:
        model: A model's name or folder.
        compiled: Compile the model's graph; False runs vLLM's eager mode, for the families of
            `options.EAGER`.
        engine: More arguments of the engine; none may contradict those given here.
        **options: `precision`, `kv`, `exact_accuracy` or `exact_products`, as `HealConfig` has
            them.

    Raises:
        ConfigError: An option is unknown or has a wrong value, or `engine` contradicts.
    """
    asked = EngineOptions.read(options)
    compilation = {"mode": 2, "backend": BACKEND, "custom_ops": ["none"]}
    ours = {
        "model": model,
        "dtype": "float32",
        "quantization": "heal",
        "additional_config": {"heal": asked.given},
        "attention_backend": "CUSTOM",
        **({} if (engine or {}).get("speculative_config") else {"logits_processors": [SEEDS]}),
        **({"compilation_config": compilation} if compiled else {"enforce_eager": True}),
    }
    return asked.joined(ours, engine or {})


def command_line(model: str, *, compiled: bool = True, **options: Any) -> list[str]:
    """The same as words of a command: `vllm serve MODEL --dtype float32 ...`.

    The environment is the caller's: a compiled engine needs VLLM_USE_AOT_COMPILE=0.

    Args:
        model: As `engine_args` takes it.
        compiled: As `engine_args` takes it.
        **options: As `engine_args` takes them.

    Raises:
        ConfigError: An option is unknown or has a wrong value.
    """
    given = engine_args(model, compiled=compiled, **options)
    words = ["vllm", "serve", given.pop("model")]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [flag, *value]
            continue
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += [flag] if value is True else [flag, text]
    return words


def register() -> None:
    """What vLLM calls in every process: names for what an engine may ask for."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from healpass.integrations.vllm import layers, quant

    if quant.registered():
        return
    register_quantization_config("heal")(quant.HealQuantConfig)
    layers.register()
    for model in GEMMA:
        ModelRegistry.register_model(model, f"{_HERE}.gemma:{model}")
    register_backend(AttentionBackendEnum.CUSTOM, f"{_HERE}.chosen.Backend")
    if current_platform.is_cpu():  # the platform offers no choice: the name there looks itself
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{_HERE}.chosen.CpuBackend")
