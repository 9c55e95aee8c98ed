"""HEAL for transformers: one call that sets a model up, and the cache that generation needs.

Layer: integrations. Imports `config` and `errors`.

A pass over the graph keeps activations in FP32 between kernels, but it cannot widen a key/value
cache that the caller owns: `generate` makes a cache of the model's dtype, and a BF16 cache rounds
every key and value to 8 bits. `HealCache` stores FP32. `heal_model(model)` compiles the model and
lets `generate` use that cache.

`CompileConfig(backend="heal", mode=None, options={...})` works as well, but `generate` compiles
with it only the decode step, and only on accelerators: the prefill stays uncompiled. Prefer
`heal_model`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from healpass.config import CHOICES, HealConfig
from healpass.errors import CacheError, ConfigError, UnavailableError, suggestion

FULL = (
    "HealCache is full: a static cache cannot take tokens past max_cache_len. Make it longer, "
    "HealCache(config, max_cache_len=...), or leave max_cache_len out for one that grows."
)


class _WideLayer(CacheLayerMixin):
    """Mixin in front of a layer of transformers: keeps FP32, hands out the dtype that came in.

    Attention needs queries, keys and values of one dtype when Dynamo traces it, hence the last
    cast. In a graph compiled by HEAL the incoming states are FP32 already and that cast is
    dropped, so attention reads what is stored. FP64 states are kept in FP64.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers in FP32, whatever the dtype of the states."""
        super().lazy_initialization(_wide(key_states), _wide(value_states))  # type: ignore[safe-super]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states `[B, H, L, E]` and return all of them in the dtype of the new ones.

        Raises:
            CacheError: Batch, heads or head size differ from what the cache holds, or it is full.
        """
        _check_shape(self, key_states, value_states)
        _warn_uncompiled(key_states)
        keys, values = super().update(  # type: ignore[safe-super]
            _wide(key_states), _wide(value_states), *args, **kwargs
        )
        return keys.to(key_states.dtype), values.to(value_states.dtype)


class HealDynamicLayer(_WideLayer, DynamicLayer):
    """Grows with the text."""


class HealDynamicSlidingWindowLayer(_WideLayer, DynamicSlidingWindowLayer):
    """Grows up to the window, then forgets the oldest token."""


class HealStaticLayer(_WideLayer, StaticLayer):
    """Allocated once; compiles to one graph for all lengths."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `_WideLayer`, after a check that the new states fit."""
        end = self.cumulative_length + key_states.shape[-2]
        if torch.compiler.is_compiling():
            # As data: a Python length would change with every token, and be guarded on.
            torch._assert_async(end <= self.max_cache_len, FULL)
        elif end > self.max_cache_len:
            raise CacheError(
                f"{FULL}\nAsked: {int(end)} tokens. Room: {self.max_cache_len}. None was stored."
            )
        return super().update(key_states, value_states, *args, **kwargs)


class HealStaticSlidingWindowLayer(_WideLayer, StaticSlidingWindowLayer):
    """Allocated once with the window's length; rolls over, so it is never full."""


_DYNAMIC = {
    "full_attention": HealDynamicLayer,
    "sliding_attention": HealDynamicSlidingWindowLayer,
    "chunked_attention": HealDynamicSlidingWindowLayer,
    "dummy": DummyLayer,
}
_STATIC = {
    "full_attention": HealStaticLayer,
    "sliding_attention": HealStaticSlidingWindowLayer,
    "chunked_attention": HealStaticSlidingWindowLayer,
    "dummy": DummyLayer,
}


class HealCache(Cache):
    """A key/value cache in FP32, whatever the model's dtype.

    It follows the protocol of transformers' caches: pass it as `past_key_values=` to a model or to
    `generate`, reorder it for beams, reset it, offload it. Use it with a model that HEAL compiles:
    an uncompiled 16-bit model hands over states that are rounded already (a warning says so).

    Args:
        config: The model's configuration; it tells layers, windows and shared layers.
        max_cache_len: Length of a static cache, which compiles to fewer graphs; None for one that
            grows.
        kv: Format of keys and values: `"fp32"`.
        offloading: Keep all layers but the current one on the CPU (CUDA only).

    Raises:
        CacheError: The length is not positive, or a layer keeps a state that is not keys and
            values.
        UnavailableError: `kv` is `"int16"` or `"int24"`.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int | None = None,
        kv: str = "fp32",
        *,
        offloading: bool = False,
    ) -> None:
        _check_kv(kv)
        if max_cache_len is not None and max_cache_len < 1:
            raise CacheError(f"max_cache_len={max_cache_len}: at least 1 is needed, or None.")
        layers = _make_layers(config.get_text_config(decoder=True), max_cache_len)
        super().__init__(layers=layers, offloading=offloading)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the states `[B, H, L, E]` of one layer and return all of that layer's.

        Raises:
            CacheError: The layer does not exist, the shapes differ, or a static cache is full.
        """
        if layer_idx >= len(self.layers):
            raise CacheError(
                f"HealCache was asked for layer {layer_idx} but has {len(self.layers)} layers: "
                "it was made from another model's configuration. Make it with "
                "HealCache(model.config)."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def room(self) -> int | None:
        """Tokens that fit in all, or None where nothing limits them (growing, sliding layers)."""
        lengths = [x.max_cache_len for x in self.layers if isinstance(x, HealStaticLayer)]
        return min(lengths, default=None)


def heal_model(model: PreTrainedModel, **config: Any) -> PreTrainedModel:
    """Compile a transformers model with HEAL, in place, and give `generate` an FP32 cache.

    The model stays the object it was (a `PreTrainedModel`, so Trainer, PEFT and evaluation
    harnesses accept it). Where the caller of `generate` passes no cache, `HealCache` takes the
    place of the one that transformers would have made. Logits are handed out in FP32 (unless
    `outputs="traced"` is given): rounded to BF16, the best two tokens often tie.

    Args:
        model: A `PreTrainedModel`; not the result of `torch.compile`.
        **config: Fields of `healpass.HealConfig`, as `precision="layercast"`; `outputs` is
            `"fp32"` by default.

    Returns:
        The same model.

    Raises:
        ConfigError: The model is of another kind, or an option is wrong.
        UnavailableError: An option is not in this version.
    """
    config = {"outputs": "fp32"} | config
    options = HealConfig.from_options(config, None)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"heal_model needs a transformers PreTrainedModel, got {type(model).__name__}. Pass "
            "the model itself, before torch.compile; for other modules use torch.compile(model, "
            "backend='heal')."
        )
    model.compile(backend="heal", dynamic=True, options=config)
    if options.rewrites and hasattr(model, "_prepare_cache_for_generation"):
        # `generate` makes its cache in this method and offers no public hook. It is replaced on
        # this one object; the class, and every other model, stay as they are.
        hook: Any = functools.partial(_prepare_cache, model)
        model._prepare_cache_for_generation = hook
    return model


def _prepare_cache(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Let transformers choose the kind of cache, then put an FP32 cache of that kind there."""
    given = model_kwargs.get("past_key_values")
    _check_given(model, given, max_cache_length)
    _disable_auto_compile(generation_config)
    type(model)._prepare_cache_for_generation(
        model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    made = model_kwargs.get("past_key_values")
    if given is None and made is not None:
        cache = _widen(made, model.config)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache


def _check_given(model: Any, cache: Any, length: int) -> None:
    """Refuse a caller's cache that cannot work, before any work; warn of one that rounds."""
    if isinstance(cache, HealCache):
        if cache.room is not None and cache.room < length:
            raise CacheError(
                f"HealCache holds {cache.room} tokens, and generate may need {length} (prompt and "
                f"new tokens). Make it longer, HealCache(config, max_cache_len={length}), or "
                "generate fewer tokens."
            )
    elif isinstance(cache, DynamicCache) and model.dtype.itemsize < 4:
        raise CacheError(
            f"generate was given a {type(cache).__name__}, which keeps {model.dtype} keys and "
            "values and cannot be mixed with the FP32 ones of a HEAL model. Pass "
            "HealCache(model.config), or leave past_key_values out."
        )
    elif cache is not None and model.dtype.itemsize < 4:
        warnings.warn(
            f"generate was given a {type(cache).__name__}, which rounds keys and values to "
            f"{model.dtype}: results may depend on the batch. Pass HealCache(model.config, "
            "max_cache_len=...), or leave past_key_values out.",
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


def _widen(cache: Any, config: Any) -> Any:
    """Return an empty FP32 cache of the kind and length of an empty cache of transformers."""
    if isinstance(cache, EncoderDecoderCache):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        return EncoderDecoderCache(*(_widen(part, config) for part in parts))
    if type(cache) not in (DynamicCache, StaticCache):
        return _kept(cache, f"a {type(cache).__name__} was asked for")
    foreign = _foreign_layers(config.get_text_config(decoder=True))
    if foreign:
        return _kept(cache, f"layers of type {', '.join(foreign)} keep more than keys and values")
    length = cache.get_max_length() if isinstance(cache, StaticCache) else None
    return HealCache(config, max_cache_len=length, offloading=cache.offloading)


def _kept(cache: Any, why: str) -> Any:
    warnings.warn(
        f"no FP32 cache: {why}. Keys and values are rounded to the model's dtype, and results "
        "may depend on the batch.",
        stacklevel=6,
    )
    return cache


def _foreign_layers(config: Any) -> list[str]:
    return sorted(set(get_layer_types_and_kwargs(config)[0]) - set(_DYNAMIC))


def _make_layers(config: Any, max_cache_len: int | None) -> list[Any]:
    """One layer per layer of the model, as its configuration lists them."""
    foreign = _foreign_layers(config)
    if foreign:
        raise CacheError(
            f"HealCache cannot serve {config.model_type}: its layers of type "
            f"{', '.join(foreign)} keep a state that is not keys and values. Use the cache of "
            "transformers; it rounds to 16 bits."
        )
    types, arguments = get_layer_types_and_kwargs(config)
    if max_cache_len is None:
        return [_DYNAMIC[kind](**extra) for kind, extra in zip(types, arguments, strict=True)]
    return [
        _STATIC[kind](max_cache_len=max_cache_len, **extra)
        for kind, extra in zip(types, arguments, strict=True)
    ]


def _check_kv(kv: str) -> None:
    known = [value for value in CHOICES["kv"] if value is not None]
    if kv not in known:
        raise ConfigError(
            f"kv={kv!r} is not one of {', '.join(map(repr, known))}.{suggestion(str(kv), known)}"
        )
    if kv != "fp32":
        raise UnavailableError(
            f"kv={kv!r} is not in this version of healpass: it comes with the integer attention. "
            "kv='fp32' is the most accurate cache and is available."
        )


def _check_shape(layer: Any, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Compare batch, heads and head size with what is stored; a growing cache starts empty."""
    if not layer.is_initialized or layer.keys.numel() == 0:
        return
    for name, new, old in (
        ("keys", key_states, layer.keys),
        ("values", value_states, layer.values),
    ):
        if new.shape[:2] != old.shape[:2] or new.shape[3] != old.shape[3]:
            raise CacheError(
                f"HealCache holds {name} of batch {old.shape[0]}, {old.shape[1]} heads of size "
                f"{old.shape[3]}, and got batch {new.shape[0]}, {new.shape[1]} heads of size "
                f"{new.shape[3]}. Make one cache per model and batch size; reset() keeps the "
                "batch size."
            )


def _warn_uncompiled(states: torch.Tensor) -> None:
    """Say so where compilation was skipped, which transformers does silently on CPU."""
    if torch.compiler.is_compiling() or states.dtype.itemsize >= 4:
        return
    warnings.warn(
        "HealCache is filled by a model that is not compiled: its states are rounded to "
        f"{states.dtype} before they arrive. Call heal_model(model), or "
        "model.compile(backend='heal', dynamic=True), first (generate does not compile on CPU "
        "by itself, and never compiles the prefill). If it is compiled, torch's recompile limit "
        "was reached: torch._dynamo.config.recompile_limit.",
        stacklevel=3,
    )


def _wide(states: torch.Tensor) -> torch.Tensor:
    """FP32 states; contiguous, because a growing cache keeps the layout of what came first.

    Another layout of the cache would be another compiled graph.
    """
    return states.to(torch.promote_types(states.dtype, torch.float32)).contiguous()
