"""HEAL for transformers: one call that sets a model up, and the cache that generation needs.

Layer: integrations. Imports `config` and `errors`.

A pass over the graph keeps activations in FP32 between kernels, but it cannot widen a key/value
cache that the caller owns: `generate` makes a cache of the model's dtype, and a BF16 cache rounds
every key and value to 8 bits. `HealCache` stores integers of 16 or 24 bits, or FP32.
`heal_model(model)` compiles the model, gives it HEAL's attention and lets `generate` use that
cache.

`CompileConfig(backend="heal", mode=None, options={...})` works as well, but `generate` compiles
with it only the decode step, and only on accelerators: the prefill stays uncompiled. Prefer
`heal_model`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

from healpass.config import HealConfig
from healpass.errors import CacheError, ConfigError, missing_extra

try:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
except ImportError as error:
    raise missing_extra("healpass.integrations.transformers", "hf", error) from error

from healpass.integrations.attention import register
from healpass.integrations.cache import HealCache, foreign_layers

__all__ = ["HealCache", "heal_model", "register"]


def heal_model(model: Any, **config: Any) -> Any:
    """Compile a transformers model with HEAL, in place: arithmetic, attention, mask and cache.

    The model stays the object it was (a `PreTrainedModel`, so Trainer, PEFT and evaluation
    harnesses accept it). Where the caller of `generate` passes no cache, `HealCache` takes the
    place of the one that transformers would have made. Logits are handed out in FP32 (unless
    `outputs="traced"` is given): rounded to BF16, the best two tokens often tie.

    Args:
        model: A `PreTrainedModel`, or a `PeftModel` around one; not the result of `torch.compile`.
        **config: Fields of `healpass.HealConfig`, as `precision="layercast"`; `outputs` is
            `"fp32"` by default. `kv` decides the cache's format too: None is INT16 with
            `precision="heal"`, FP32 with `layercast`.

    Returns:
        The same model.

    Raises:
        ConfigError: The model is of another kind, or an option is wrong.
    """
    config = {"outputs": "fp32"} | config
    options = HealConfig.from_options(config, None)
    base, entries = _entry_points(model)
    for entry in entries:
        entry.compile(backend="heal", dynamic=True, options=config)
    if options.rewrites and base._can_set_attn_implementation():
        register()
        base.set_attn_implementation("heal")
    if options.rewrites and hasattr(base, "_prepare_cache_for_generation"):
        # `generate` makes its cache in this method and offers no public hook. It is replaced on
        # this one object; the class, and every other model, stay as they are.
        hook: Any = functools.partial(_prepare_cache, base, options)
        base._prepare_cache_for_generation = hook
    return model


def _entry_points(model: Any) -> tuple[Any, list[Any]]:
    """The model of transformers, and the modules whose call has to be compiled.

    PEFT wraps a model in a tuner (LoRA), which calls the model's `forward` and not the model, so
    that compiling the model alone would leave training uncompiled; `generate` calls the model.
    """
    if isinstance(model, PreTrainedModel):
        return model, [model]
    peft = sys.modules.get("peft")  # whoever has a PeftModel has imported it
    if peft is not None and isinstance(model, peft.PeftModel):
        base, tuner = model.get_base_model(), model.base_model
        return base, [base] if tuner is base else [base, tuner]
    raise ConfigError(
        f"heal_model needs a transformers PreTrainedModel, or a PeftModel, got "
        f"{type(model).__name__}. Pass the model itself, before torch.compile; for other modules "
        "use torch.compile(model, backend='heal')."
    )


def _prepare_cache(
    model: Any,
    options: HealConfig,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Let transformers choose the kind of cache, then put a HealCache of that kind there."""
    name = _cache_name(model_kwargs)
    given = None if name is None else model_kwargs[name]
    _check_given(model, options, given, max_cache_length)
    _disable_auto_compile(generation_config)
    type(model)._prepare_cache_for_generation(
        model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    name = _cache_name(model_kwargs)
    if given is None and name is not None:
        cache = _healed(model_kwargs[name], model.config, options.attention_format)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[name] = cache


def _cache_name(model_kwargs: dict[str, Any]) -> str | None:
    """The argument that holds the cache, None where there is none.

    It is found by its type: transformers 5.24 renamed `past_key_values` to `cache`, and a name
    that is not there would leave a BF16 cache in place, in silence.
    """
    return next((name for name, value in model_kwargs.items() if isinstance(value, Cache)), None)


def _check_given(model: Any, options: HealConfig, cache: Any, length: int) -> None:
    """Refuse a caller's cache that cannot work, before any work; warn of one that rounds."""
    if isinstance(cache, HealCache):
        if options.kv not in (None, cache.kv):
            raise CacheError(
                f"heal_model was asked for kv={options.kv!r}, and generate was given a HealCache "
                f"that keeps {cache.kv}. Make it HealCache(config, kv={options.kv!r}), or leave "
                "kv out of heal_model: the cache's format is then used."
            )
        if cache.room is not None and cache.room < length:
            raise CacheError(
                f"HealCache holds {cache.room} tokens, and generate may need {length} (prompt and "
                f"new tokens). Make it longer, HealCache(config, max_cache_len={length}), or "
                "generate fewer tokens."
            )
    elif isinstance(cache, DynamicCache) and model.dtype.itemsize < 4:
        raise CacheError(
            f"generate was given a {type(cache).__name__}, which keeps {model.dtype} keys and "
            "values and cannot be mixed with those of a HEAL model. Pass "
            "HealCache(model.config), or no cache."
        )
    elif cache is not None and model.dtype.itemsize < 4:
        warnings.warn(
            f"generate was given a {type(cache).__name__}, which rounds keys and values to "
            f"{model.dtype}: results may depend on the batch. Pass HealCache(model.config, "
            "max_cache_len=...), or no cache.",
            stacklevel=4,
        )


def _disable_auto_compile(generation_config: Any) -> None:
    """Keep `generate` from compiling the compiled model again, with a backend that is not HEAL."""
    if generation_config.compile_config is not None:
        warnings.warn(
            "compile_config is ignored: heal_model has compiled this model, prefill included. "
            "Give options to heal_model(model, ...) instead.",
            stacklevel=5,
        )
    generation_config.disable_compile = True


def _healed(cache: Any, config: Any, kv: str) -> Any:
    """Return an empty HealCache of the kind and length of an empty cache of transformers."""
    if isinstance(cache, EncoderDecoderCache):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        return EncoderDecoderCache(*(_healed(part, config, kv) for part in parts))
    if type(cache) not in (DynamicCache, StaticCache):
        return _kept(cache, f"a {type(cache).__name__} was asked for")
    foreign = foreign_layers(config.get_text_config(decoder=True))
    if foreign:
        return _kept(cache, f"layers of type {', '.join(foreign)} keep more than keys and values")
    length = cache.get_max_length() if isinstance(cache, StaticCache) else None
    return HealCache(config, length, kv, offloading=cache.offloading)


def _kept(cache: Any, why: str) -> Any:
    warnings.warn(
        f"no HealCache: {why}. Keys and values are rounded to the model's dtype, and results "
        "may depend on the batch.",
        stacklevel=6,
    )
    return cache
