"""HealCache: keys and values as integers or in FP32. Layer `integrations`: imports `ops`.

It follows the cache protocol of transformers, whose own layers do the bookkeeping: an FP32 layer
*is* one of them, an integer layer *has* two of them, one that holds digits `[B, H * D, S, E]` and
one that holds scales `[B, H, S, 1]`. Whatever moves digits moves their scales.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.config import CHOICES
from healpass.errors import CacheError, ConfigError, suggestion
from healpass.ops.quantize import FORMATS

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

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers in FP32, whatever the dtype of the states."""
        super().lazy_initialization(_wide(key_states), _wide(value_states))  # type: ignore[safe-super]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states `[B, H, L, E]` and return all of them in the dtype of the new ones."""
        keys, values = super().update(  # type: ignore[safe-super]
            _wide(key_states), _wide(value_states), *args, **kwargs
        )
        mark = torch.ops.heal.stored
        return mark(keys).to(key_states.dtype), mark(values).to(value_states.dtype)

    @property
    def stores(self) -> tuple[Any, ...]:
        """The layers of transformers that hold the tensors."""
        return (self,)

    def held(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shapes of the stored keys and values, None while nothing is stored."""
        if not self.is_initialized or self.keys is None or self.keys.numel() == 0:
            return None
        assert self.values is not None, "stored with the keys"
        return tuple(self.keys.shape), tuple(self.values.shape)


class HealDynamicLayer(_WideLayer, DynamicLayer):
    """Grows with the text."""


class HealDynamicSlidingWindowLayer(_WideLayer, DynamicSlidingWindowLayer):
    """Grows up to the window, then forgets the oldest token."""


class HealStaticLayer(_WideLayer, StaticLayer):
    """Allocated once; compiles to one graph for all lengths."""


class HealStaticSlidingWindowLayer(_WideLayer, StaticSlidingWindowLayer):
    """Allocated once with the window's length; rolls over, so it is never full."""


class HealIntegerLayer(CacheLayerMixin):
    """Keys and values as digits and scales, in two layers of transformers.

    Args:
        make: Makes one such layer; called twice.
        kv: `int16` or `int24`.
    """

    def __init__(self, make: Callable[[], Any], kv: str) -> None:
        super().__init__()
        self.kv = kv
        self.digits, self.scales = make(), make()
        self.is_compileable = self.digits.is_compileable
        self.is_croppable = self.digits.is_croppable
        self.is_sliding = self.digits.is_sliding

    @property
    def stores(self) -> tuple[Any, ...]:
        """The layers of transformers that hold the tensors."""
        return self.digits, self.scales

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for states of these shapes; their values are not looked at."""
        (keys, key_scales), (values, value_scales) = map(self._split, (key_states, value_states))
        self.digits.lazy_initialization(keys, values)
        self.scales.lazy_initialization(key_scales, value_scales)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantize and store new states `[B, H, L, E]`; return all, dequantized, in their dtype.

        Raises:
            CacheError: The states carry a gradient, which integers cannot.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise CacheError(
                f"HealCache(kv={self.kv!r}) got states that need a gradient, which integers do "
                "not carry. Call the model under torch.no_grad(), or use kv='fp32'."
            )
        (keys, key_scales), (values, value_scales) = map(self._split, (key_states, value_states))
        digits = self.digits.update(keys, values, *args, **kwargs)
        scales = self.scales.update(key_scales, value_scales, *args, **kwargs)
        self.is_initialized = True
        shape = (key_states.shape[1], FORMATS[self.kv].digits)
        all_keys, all_values = (
            torch.ops.heal.dequantize(part.unflatten(1, shape), scale.squeeze(-1))
            for part, scale in zip(digits, scales, strict=True)
        )
        return all_keys.to(key_states.dtype), all_values.to(value_states.dtype)

    def _split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Digits `[B, H * D, L, E]` and scales `[B, H, L, 1]`."""
        digits, scale = torch.ops.heal.quantize(states, self.kv)
        return digits.flatten(1, 2), scale.unsqueeze(-1)

    def held(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shapes of the stored keys and values, None while nothing is stored."""
        store, scales = self.digits, self.scales
        if not self.is_initialized or store.keys is None or store.keys.numel() == 0:
            return None
        batch, heads, length, _ = scales.keys.shape
        sizes = (store.keys.shape[-1], store.values.shape[-1])
        keys, values = ((batch, heads, length, size) for size in sizes)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` will return."""
        sizes: tuple[int, int] = self.digits.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> Any:
        """Tokens seen; a tensor in a static layer."""
        return self.digits.get_seq_length()

    def get_max_length(self) -> int:
        """Tokens that fit, -1 where nothing limits them."""
        length: int = self.digits.get_max_length()
        return length

    def reset(self) -> None:
        """Forget everything, keep static buffers."""
        self._each("reset")
        self.is_initialized = self.digits.is_initialized

    def offload(self) -> None:
        """Move digits and scales to the CPU."""
        self._each("offload")

    def prefetch(self) -> None:
        """Move digits and scales back to their device."""
        self._each("prefetch")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put the batch into another order, for beam search."""
        self._each("reorder_cache", beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of a growing cache."""
        self._each("crop", tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._each("batch_select_indices", indices)

    def activate_past_recording(self) -> None:
        """Keep more than the window until `crop` is called (assisted decoding)."""
        if self.is_sliding and not self.is_compileable:
            self._each("activate_past_recording")

    @property
    def record_past(self) -> bool:
        """Whether more than the window is kept."""
        return getattr(self.digits, "record_past", False)

    def _each(self, method: str, *args: Any) -> None:
        for store in self.stores:
            getattr(store, method)(*args)


_DYNAMIC = {
    "full_attention": (HealDynamicLayer, DynamicLayer),
    "sliding_attention": (HealDynamicSlidingWindowLayer, DynamicSlidingWindowLayer),
    "chunked_attention": (HealDynamicSlidingWindowLayer, DynamicSlidingWindowLayer),
}
_STATIC = {
    "full_attention": (HealStaticLayer, StaticLayer),
    "sliding_attention": (HealStaticSlidingWindowLayer, StaticSlidingWindowLayer),
    "chunked_attention": (HealStaticSlidingWindowLayer, StaticSlidingWindowLayer),
}


class HealCache(Cache):
    """A key/value cache in integers or FP32, whatever the model's dtype.

    It follows the protocol of transformers' caches: pass it as `past_key_values=` to a model or to
    `generate`, reorder it for beams, reset it, offload it. Use it with a model that HEAL compiles:
    an uncompiled 16-bit model hands over states that are rounded already (a warning says so).

    INT16 takes the bytes of a BF16 cache and one FP32 scale per token and head, and rounds
    twenty-five times finer; INT24 takes three bytes and is as close as FP32.

    Args:
        config: The model's configuration; it tells layers, windows and shared layers.
        max_cache_len: Length of a static cache, which compiles to fewer graphs; None for one that
            grows.
        kv: Format of keys and values: `"int16"`, `"int24"` or `"fp32"`.
        offloading: Keep all layers but the current one on the CPU (CUDA only).

    Raises:
        CacheError: The length is not positive, or a layer keeps a state that is not keys and
            values.
        ConfigError: `kv` is another format.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int | None = None,
        kv: str = "int16",
        *,
        offloading: bool = False,
    ) -> None:
        known = [value for value in CHOICES["kv"] if value is not None]
        if kv not in known:
            raise ConfigError(
                f"kv={kv!r} is not one of {', '.join(map(repr, known))}."
                f"{suggestion(str(kv), known)}"
            )
        if max_cache_len is not None and max_cache_len < 1:
            raise CacheError(f"max_cache_len={max_cache_len}: at least 1 is needed, or None.")
        self.kv = kv
        layers = list(_make_layers(config.get_text_config(decoder=True), max_cache_len, kv))
        super().__init__(layers=layers, offloading=offloading)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Store the states `[B, H, L, E]` of one layer and return all of that layer's.

        Raises:
            CacheError: The layer does not exist, dtypes or shapes differ, or a static cache is
                full. Nothing is stored then.
        """
        if layer_idx >= len(self.layers):
            raise CacheError(
                f"HealCache was asked for layer {layer_idx} but has {len(self.layers)} layers: "
                "it was made from another model's configuration. Make it with "
                "HealCache(model.config)."
            )
        layer = self.layers[layer_idx]
        _check_states(layer, key_states, value_states)
        _check_room(layer, key_states.shape[-2])
        _warn_uncompiled(key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def room(self) -> int | None:
        """Tokens that fit in all, or None where nothing limits them (growing, sliding layers)."""
        return min((x.get_max_length() for x in self.layers if _is_bounded(x)), default=None)


def _make_layers(config: Any, max_cache_len: int | None, kv: str) -> Iterator[Any]:
    """One layer per layer of the model, as its configuration lists them."""
    foreign = foreign_layers(config)
    if foreign:
        raise CacheError(
            f"HealCache cannot serve {config.model_type}: its layers of type "
            f"{', '.join(foreign)} keep a state that is not keys and values. Use the cache of "
            "transformers; it rounds to 16 bits."
        )
    types, arguments = get_layer_types_and_kwargs(config)
    for kind, extra in zip(types, arguments, strict=True):
        if kind not in _DYNAMIC:
            yield DummyLayer(**extra)
            continue
        length = {} if max_cache_len is None else {"max_cache_len": max_cache_len}
        wide, plain = (_STATIC if length else _DYNAMIC)[kind]
        made = functools.partial(wide if kv == "fp32" else plain, **length, **extra)
        yield made() if kv == "fp32" else HealIntegerLayer(made, kv)


def foreign_layers(config: Any) -> list[str]:
    """The layer types of a model that keep more than keys and values."""
    return sorted(set(get_layer_types_and_kwargs(config)[0]) - {*_DYNAMIC, "dummy"})


def _is_bounded(layer: Any) -> bool:
    """Whether a layer is static and keeps every token."""
    ours = isinstance(layer, (HealStaticLayer, HealIntegerLayer))
    return ours and layer.is_compileable and not layer.is_sliding


def _check_room(layer: Any, tokens: int) -> None:
    """Refuse tokens that a static layer has no room for."""
    if not _is_bounded(layer):
        return
    end = layer.stores[0].cumulative_length + tokens  # a tensor
    if torch.compiler.is_compiling():
        # As data: a Python length would change with every token, and be guarded on.
        torch._assert_async(end <= layer.get_max_length(), FULL)
    elif end > layer.get_max_length():
        raise CacheError(
            f"{FULL}\nAsked: {int(end)} tokens. Room: {layer.get_max_length()}. None was stored."
        )


def _check_states(layer: Any, key_states: Tensor, value_states: Tensor) -> None:
    """Compare dtypes with each other, and batch, heads and head size with what is stored."""
    if key_states.dtype != value_states.dtype:
        raise CacheError(
            f"HealCache got keys in {key_states.dtype} and values in {value_states.dtype}. Cast "
            "them to one dtype first: the model's parts disagree."
        )
    held = layer.held() if hasattr(layer, "held") else None
    for name, new, old in zip(
        ("keys", "values"), (key_states.shape, value_states.shape), held or (), strict=False
    ):
        if new[:2] != old[:2] or new[3] != old[3]:
            raise CacheError(
                f"HealCache holds {name} of batch {old[0]}, {old[1]} heads of size {old[3]}, and "
                f"got batch {new[0]}, {new[1]} heads of size {new[3]}. Make one cache per model "
                "and batch size; reset() keeps the batch size."
            )


def _warn_uncompiled(states: Tensor) -> None:
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


def _wide(states: Tensor) -> Tensor:
    """FP32 states; contiguous, because a growing cache keeps the layout of what came first.

    Another layout of the cache would be another compiled graph.
    """
    return states.to(torch.promote_types(states.dtype, torch.float32)).contiguous()
