"""The cache that `generate` and a hand-written decode loop get. Layer: integrations.

`generate` makes its cache in one method and offers no public hook; `heal_model` replaces that
method on the one object it is given. Imports `config`, `errors`, `integrations.cache`.
"""

from __future__ import annotations

import warnings
from typing import Any

from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation.configuration_utils import GenerationMode

from healpass.config import HealConfig
from healpass.errors import CacheError, ConfigError
from healpass.integrations.cache import HealCache, foreign_layers

#: Ways of `generate` that take back tokens which turned out wrong.
TAKING_BACK = (GenerationMode.ASSISTED_GENERATION,)


def prepare_cache(
    model: Any,
    options: HealConfig,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Let transformers choose the kind of cache, then put a HealCache of that kind there.

    Args:
        model: The model that generates.
        options: Those that `heal_model` was given.
        generation_config: That of this call; automatic compilation is switched off in it.
        model_kwargs: Arguments of the model's forward; the cache is put there.
        generation_mode: As transformers names it: whether tokens are taken back depends on it.
        batch_size: Rows, as transformers counts them.
        max_cache_length: Tokens that the cache may have to hold, prompt and answer.
    """
    name = _cache_name(model_kwargs)
    given = None if name is None else model_kwargs[name]
    _check_given(model, options, given, max_cache_length)
    _check_taking_back(given, generation_mode, max_cache_length)
    _disable_auto_compile(generation_config)
    _keep_on_cpu(model, generation_config)
    type(model)._prepare_cache_for_generation(
        model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    name = _cache_name(model_kwargs)
    if given is None and name is not None:
        cache = _healed(model_kwargs[name], model.config, options.attention_format)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[name] = cache


def own_cache(model: Any, kv: str, extent: tuple[int, int], *, crossed: bool) -> Any:
    """The HealCache for a call without a cache, None where there is none for this model.

    Args:
        model: The model that is called.
        kv: The format.
        extent: Rows, and tokens of each.
        crossed: Whether the model attends to an encoder's states.
    """
    made: dict[str, Any] = {}
    if issubclass(type(model), GenerationMixin):
        type(model)._prepare_cache_for_generation(
            model, GenerationConfig(), made, GenerationMode.GREEDY_SEARCH, *extent
        )
    else:
        plain = DynamicCache(config=model.config.get_text_config(decoder=True))
        pair = EncoderDecoderCache(plain, DynamicCache(config=model.config)) if crossed else plain
        made["cache"] = pair
    name = _cache_name(made)
    if name is None or _why_not(made[name], model.config):
        return None
    return _healed(made[name], model.config, kv)


def refuse_continuous_batching(model: Any, *_args: Any, **_kwargs: Any) -> None:
    """Stand in the place of `init_continuous_batching`, through which all its ways lead.

    Args:
        model: The model, whose dtype the message names.
        *_args: Not read.
        **_kwargs: Not read.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        "generate_batch (continuous batching) was asked for, and heal_model does not cover it: "
        f"its paged cache keeps keys and values in {model.dtype}, and it packs requests into one "
        "row, so that results would depend on what else is running.\n"
        "Use generate(...), in batches, or healpass.integrations.transformers.unheal_model(model) "
        "for transformers' own arithmetic."
    )


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


def _check_taking_back(cache: Any, mode: Any, length: int) -> None:
    """A static window that has rolled over cannot give back what it has forgotten."""
    if mode not in TAKING_BACK or not isinstance(cache, HealCache):
        return
    layers: list[Any] = cache.layers
    windows = [x.get_max_length() for x in layers if x.is_sliding and x.is_compileable]
    if windows and min(windows) < length:
        raise CacheError(
            f"prompt lookup and assistants take tokens back, and generate may need {length} "
            f"tokens; a layer of this static HealCache keeps only the last {min(windows)} (its "
            "sliding window) and cannot restore what they overwrote. Pass "
            "HealCache(model.config), which grows, or no cache."
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


def _keep_on_cpu(model: Any, generation_config: Any) -> None:
    """A model on the CPU has nothing to offload: its cache is there already."""
    kinds = {"offloaded": "dynamic", "offloaded_static": "static"}
    if model.device.type == "cpu":
        kind = generation_config.cache_implementation
        generation_config.cache_implementation = kinds.get(kind, kind)


def _why_not(cache: Any, config: Any) -> str | None:
    """Why a cache of transformers cannot be replaced, None if it can."""
    if isinstance(cache, EncoderDecoderCache):
        return _why_not(cache.self_attention_cache, config)
    if type(cache) not in (DynamicCache, StaticCache):
        return f"a {type(cache).__name__} was asked for"
    foreign = foreign_layers(config.get_text_config(decoder=True))
    if foreign:
        return f"layers of type {', '.join(foreign)} keep more than keys and values"
    return None


def _healed(cache: Any, config: Any, kv: str) -> Any:
    """Return an empty HealCache of the kind and length of an empty cache of transformers."""
    why = _why_not(cache, config)
    if why:
        warnings.warn(
            f"no HealCache: {why}. Keys and values are rounded to the model's dtype, and results "
            "may depend on the batch.",
            stacklevel=6,
        )
        return cache
    if isinstance(cache, EncoderDecoderCache):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        return EncoderDecoderCache(*(_healed(part, config, kv) for part in parts))
    length = cache.get_max_length() if isinstance(cache, StaticCache) else None
    return HealCache(config, length, kv, offloading=cache.offloading)
