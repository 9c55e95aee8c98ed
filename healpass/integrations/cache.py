"""HealCache: keys and values as integers or in FP32, whatever the model's dtype.

Layer `integrations`: imports `integrations.cache_layers`, which hold the tensors.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from healpass.config import CHOICES
from healpass.errors import CacheError, ConfigError, suggestion
from healpass.integrations.cache_layers import (
    HealDynamicLayer,
    HealDynamicSlidingWindowLayer,
    HealIntegerLayer,
    HealStaticLayer,
    HealStaticSlidingWindowLayer,
)

FULL = (
    "HealCache is full: a static cache cannot take tokens past max_cache_len. Make it longer, "
    "HealCache(config, max_cache_len=...), or leave max_cache_len out for one that grows."
)


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

    It follows the protocol of transformers' caches: pass it as `past_key_values=` (`cache=` since
    transformers 5.24) to a model or to `generate`, reorder it for beams, reset it, offload it. Use
    it with a model that HEAL compiles: an uncompiled 16-bit model hands over states that are
    rounded already (a warning says so).

    INT16 takes the bytes of a BF16 cache and one FP32 scale per token and head, and rounds finer
    (`python examples/attention_accuracy.py` prints by how much); INT24 takes three bytes and is as
    close as FP32.

    Args:
        config: The model's configuration; it tells layers, windows and shared layers.
        max_cache_len: Length of a static cache, which compiles to fewer graphs; None for one that
            grows.
        kv: Format of keys and values: `"int16"`, `"int24"` or `"fp32"`.
        offloading: Keep all layers but the current one on the CPU. On the CPU it changes nothing.

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
        layer: Any = self.layers[layer_idx]
        _check_states(layer, key_states, value_states)
        _check_room(layer, key_states.shape[-2])
        if self.offloading and key_states.device.type == "cpu":  # there is nothing to offload
            found = layer.update(key_states, value_states, *args, **kwargs)
        else:
            found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        _warn_uncompiled(key_states)
        return found

    def check_call(self, rows: int, tokens: int) -> None:
        """Refuse a call of a model before it begins; `update` would refuse it in the middle.

        Args:
            rows: Rows of the batch that comes, 0 if that is not known.
            tokens: New tokens of each row.

        Raises:
            CacheError: The cache holds another batch, or a static one has no room.
        """
        layers: list[Any] = self.layers
        for layer in layers:
            held = layer.held() if hasattr(layer, "held") else None
            if rows and held is not None and held[0][0] != rows:
                raise CacheError(
                    f"HealCache holds {held[0][0]} rows, and the model was called with {rows}. "
                    "Make one cache per model and batch size; reset() keeps the batch size of a "
                    "static one."
                )
            if _is_bounded(layer) and layer.stores[0].cumulative_length.device.type == "cpu":
                _check_room(layer, tokens)  # elsewhere it would wait for the device

    def save(self, path: str | Path) -> None:
        """Write what the cache holds to a safetensors file; `load` reads it back."""
        tensors = {}
        for name, store in self._stores():
            if store.is_initialized:
                tensors[f"{name}.keys"] = store.keys.contiguous()
                tensors[f"{name}.values"] = store.values.contiguous()
            for counter in _counters(store):
                tensors[f"{name}.{counter}"] = torch.as_tensor(getattr(store, counter)).clone()
        save_file(tensors, path, {"kv": self.kv, "layers": str(len(self.layers))})

    def load(self, path: str | Path) -> None:
        """Take over what another cache of the same model, format and length has saved.

        Raises:
            CacheError: The file is of another format, number of layers, or length.
        """
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
        wanted = {"kv": self.kv, "layers": str(len(self.layers))}
        if found != wanted:
            raise CacheError(
                f"HealCache.load: {path} holds {found}, this cache is {wanted}. Make the cache "
                "with the configuration and the kv that the saved one had."
            )
        tensors = load_file(path)
        _check_lengths(self, tensors)
        for name, store in self._stores():
            _restore(store, name, tensors)
        for layer in self.layers:
            if isinstance(layer, HealIntegerLayer):
                layer.is_initialized = layer.digits.is_initialized

    def _stores(self) -> Iterator[tuple[str, Any]]:
        for index, layer in enumerate(self.layers):
            for part, store in enumerate(stores_of(layer)):
                yield f"{index}.{part}", store

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and scales; 0 before the first tokens come."""
        held = [part for _, store in self._stores() for part in (store.keys, store.values)]
        return sum(part.nbytes for part in held if isinstance(part, Tensor))

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
    for kind, extra in _kinds(config):
        if kind not in _DYNAMIC:
            yield cache_utils.DummyLayer(**extra)
            continue
        length = {} if max_cache_len is None else {"max_cache_len": max_cache_len}
        wide, plain = (_STATIC if length else _DYNAMIC)[kind]
        made = functools.partial(wide if kv == "fp32" else plain, **length, **extra)
        yield made() if kv == "fp32" else HealIntegerLayer(made, kv)


def _kinds(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The kind of each layer and what its class takes.

    Before transformers 5.19 there is one mapping for all layers; before 5.20 a layer that shares
    the keys of another has no place in the list, later it is a `DummyLayer`.
    """
    types, arguments = cache_utils.get_layer_types_and_kwargs(config)
    if isinstance(arguments, dict):
        windowed = ("sliding_attention", "chunked_attention")
        arguments = [arguments if kind in windowed else {} for kind in types]
    yield from zip(types, arguments, strict=False)


def stores_of(layer: Any) -> tuple[Any, ...]:
    """The layers of transformers that hold a layer's tensors; none for a layer that shares."""
    return getattr(layer, "stores", ())


def _counters(store: Any) -> list[str]:
    """How transformers counts the tokens of a store: numbers or tensors."""
    names = ("cumulative_length", "cumulative_length_int")
    return [name for name in names if hasattr(store, name)]


def _check_lengths(cache: HealCache, tensors: dict[str, Tensor]) -> None:
    for name, store in cache._stores():
        keys = tensors.get(f"{name}.keys")
        length = store.max_cache_len if store.is_compileable else None
        if keys is not None and length not in (None, keys.shape[-2]):
            raise CacheError(
                f"HealCache.load: the saved cache has room for {keys.shape[-2]} tokens, this one "
                f"for {length}. Make it with max_cache_len={keys.shape[-2]}."
            )


def _restore(store: Any, name: str, tensors: dict[str, Tensor]) -> None:
    """Fill one store; static buffers keep their addresses."""
    keys, values = tensors.get(f"{name}.keys"), tensors.get(f"{name}.values")
    if keys is None or values is None:
        store.reset()
        return
    if not store.is_initialized:
        store.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    if store.is_compileable:
        store.keys.copy_(keys)
        store.values.copy_(values)
    else:
        store.keys, store.values = keys.to(store.device), values.to(store.device)
    for counter in _counters(store):
        saved, held = tensors[f"{name}.{counter}"], getattr(store, counter)
        if isinstance(held, Tensor):
            held.copy_(saved)
        else:
            setattr(store, counter, int(saved))


def foreign_layers(config: Any) -> list[str]:
    """The layer types of a model that keep more than keys and values."""
    return sorted({kind for kind, _ in _kinds(config)} - {*_DYNAMIC, "dummy"})


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
    """Compare dtypes with each other, and batch, heads and head size with what is stored.

    Under autocast keys are FP32 (rotary embeddings make them so) where values are 16-bit: that is
    no mistake, and each is handed out in its own dtype.
    """
    widths = sorted(x.dtype.itemsize for x in (key_states, value_states))
    if key_states.dtype != value_states.dtype and widths != [2, 4]:
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
