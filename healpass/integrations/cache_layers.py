"""The layers of HealCache: FP32, and integers. Layer `integrations`: imports `ops`.

transformers' own layers do the bookkeeping: an FP32 layer *is* one of them, an integer layer *has*
two of them, one that holds digits `[B, H * D, S, E]` and one that holds scales `[B, H, S, 1]`.
Whatever moves digits moves their scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.errors import CacheError
from healpass.ops.attention.quantize import FORMATS


class _WideLayer(CacheLayerMixin):
    """Mixin in front of a layer of transformers: keeps FP32, hands out the dtype that came in.

    Attention needs queries, keys and values of one dtype when Dynamo traces it, hence the last
    cast. In a graph compiled by HEAL the incoming states are FP32 already and that cast is
    dropped, so attention reads what is stored. FP64 states are kept in FP64. The same holds where
    a traced model reads a layer's `keys` itself (cross-attention of most encoder-decoders); what
    moves them about, in Python, gets what is stored.
    """

    stored_keys: Tensor | None = None
    stored_values: Tensor | None = None
    #: Name -> dtype of the states that came in last.
    dtypes: dict[str, torch.dtype] = {}
    updating = False

    @property
    def keys(self) -> Tensor | None:
        """What is stored; in the dtype that came in, where a model is traced that reads it."""
        return self._read(self.stored_keys, "keys")

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self.stored_keys = states

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._read(self.stored_values, "values")

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self.stored_values = states

    def _read(self, states: Tensor | None, name: str) -> Tensor | None:
        inside = self.updating or not torch.compiler.is_compiling()
        if states is None or inside or name not in self.dtypes:
            return states
        handed: Tensor = torch.ops.heal.stored(states)
        return handed.to(self.dtypes[name])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers in FP32, whatever the dtype of the states."""
        super().lazy_initialization(_wide(key_states), _wide(value_states))  # type: ignore[safe-super]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states `[B, H, L, E]` and return all of them in the dtype of the new ones."""
        self.updating = True
        keys, values = super().update(  # type: ignore[safe-super]
            _wide(key_states), _wide(value_states), *args, **kwargs
        )
        self.updating = False
        self.dtypes = {"keys": key_states.dtype, "values": value_states.dtype}
        mark = torch.ops.heal.stored
        return mark(keys).to(key_states.dtype), mark(values).to(value_states.dtype)

    @property
    def stores(self) -> tuple[Any, ...]:
        """The layers of transformers that hold the tensors."""
        return (self,)

    def held(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shapes of the stored keys and values, None while nothing is stored."""
        keys, values = self.stored_keys, self.stored_values
        if not self.is_initialized or keys is None or keys.numel() == 0:
            return None
        assert values is not None, "stored with the keys"
        return tuple(keys.shape), tuple(values.shape)


def let_go(layer: Any) -> None:
    """Let a growing layer drop its tensors: in transformers 5.17 its reset only zeroes them."""
    if not layer.is_compileable:
        layer.keys = layer.values = None
        layer.is_initialized = False


class HealDynamicLayer(_WideLayer, DynamicLayer):
    """Grows with the text."""

    def reset(self) -> None:
        """Forget everything."""
        let_go(self)
        super().reset()


class HealDynamicSlidingWindowLayer(_WideLayer, DynamicSlidingWindowLayer):
    """Grows up to the window, then forgets the oldest token."""

    def reset(self) -> None:
        """Forget everything."""
        let_go(self)
        super().reset()


class HealStaticLayer(_WideLayer, StaticLayer):
    """Allocated once; compiles to one graph for all lengths."""

    is_croppable = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `tokens_to_remove` is negative, as in transformers."""
        crop_static(self, tokens_to_remove)


class HealStaticSlidingWindowLayer(_WideLayer, StaticSlidingWindowLayer):
    """Allocated once with the window's length; rolls over, so it is never full."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of a window that has not rolled over yet."""
        crop_static(self, tokens_to_remove)


class HealIntegerLayer(CacheLayerMixin):
    """Keys and values as digits and scales, in two layers of transformers.

    Args:
        make: Makes one such layer; called twice.
        kv: `int16` or `int24`.
    """

    keys: Any = property(lambda self: self._joined("keys"))
    values: Any = property(lambda self: self._joined("values"))
    """What is stored, dequantized: for models that read a layer's tensors themselves (T5)."""

    def __init__(self, make: Callable[[], Any], kv: str) -> None:
        self.kv = kv
        self.digits, self.scales = make(), make()
        self.is_initialized = False
        self.dtypes = {"keys": torch.float32, "values": torch.float32}
        self.is_compileable = self.digits.is_compileable
        self.is_sliding = self.digits.is_sliding
        self.is_croppable = self.digits.is_croppable or (
            self.is_compileable and not self.is_sliding
        )

    @property
    def stores(self) -> tuple[Any, ...]:
        """The layers of transformers that hold the tensors."""
        return self.digits, self.scales

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for states of these shapes; their values are not looked at."""
        (keys, key_scales), (values, value_scales) = map(self._split, (key_states, value_states))
        self.digits.lazy_initialization(keys, values)
        self.scales.lazy_initialization(key_scales, value_scales)
        self._initialized(key_states, value_states)

    def _initialized(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True
        self.dtypes = {"keys": key_states.dtype, "values": value_states.dtype}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantize and store new states `[B, H, L, E]`; return all, dequantized, in their dtypes.

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
        self._initialized(key_states, value_states)
        return (
            self._join(digits[0], scales[0], key_states.dtype),
            self._join(digits[1], scales[1], value_states.dtype),
        )

    def _join(self, digits: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of digits `[B, H * D, S, E]` and scales `[B, H, S, 1]`, `[B, H, S, E]`."""
        planes = digits.unflatten(1, (scales.shape[1], FORMATS[self.kv].digits))
        values: Tensor = torch.ops.heal.dequantize(planes, scales.squeeze(-1))
        return values.to(dtype)

    def _joined(self, name: str) -> Tensor | None:
        if self.held() is None:
            return None
        return self._join(
            getattr(self.digits, name), getattr(self.scales, name), self.dtypes[name]
        )

    @property
    def batch_size(self) -> int:
        """Rows of a static layer's batch; a growing layer of transformers does not know it."""
        size: int = self.digits.batch_size
        return size

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
        for store in self.stores:
            let_go(store)
            store.reset()
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
        """Forget the last tokens; `tokens_to_remove` is negative, as in transformers."""
        if not self.is_compileable:
            self._each("crop", tokens_to_remove)
            return
        for store in self.stores:
            crop_static(store, tokens_to_remove)

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


def crop_static(layer: Any, tokens_to_remove: int) -> None:
    """Take tokens back in a buffer: what lies past the length is masked, and written over.

    Raises:
        CacheError: The layer is a window that has rolled over what it would have to give back, or
            the number is positive.
    """
    if tokens_to_remove > 0:
        raise CacheError(
            f"HealCache.crop({tokens_to_remove}): give the number of tokens to take back as a "
            "negative number, as transformers does."
        )
    tokens = -tokens_to_remove
    if tokens == 0 or not layer.is_initialized:
        return
    if layer.is_sliding:
        if layer.cumulative_length_int > layer.max_cache_len:
            raise CacheError(
                f"HealCache.crop: {tokens} tokens were to be taken back, but a static sliding "
                f"window of {layer.max_cache_len} tokens has overwritten what came before them. "
                "Leave max_cache_len out: a cache that grows keeps the past until crop is called."
            )
        layer.cumulative_length_int -= tokens
    layer.cumulative_length.sub_(tokens)


def _wide(states: Tensor) -> Tensor:
    """FP32 states; contiguous, because a growing cache keeps the layout of what came first.

    Another layout of the cache would be another compiled graph.
    """
    return states.to(torch.promote_types(states.dtype, torch.float32)).contiguous()
