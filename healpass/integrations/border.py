"""What an entry looks at before and after compiled code: the cache among the arguments.

Layer: integrations. Imports `config`, `errors`, `integrations.cache`.

A mistake that is found while Dynamo traces costs a trace, and one that is found in a compiled
graph shows as an error of a tensor's size; here it costs nothing. A model that is called without a
cache makes one of its own, in 16 bits; one that could make a HealCache instead is given one, so
that a decode loop written by hand keeps what `generate` keeps.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.utils import output_capturing

from healpass.config import HealConfig
from healpass.integrations.cache import HealCache
from healpass.integrations.generation import own_cache

#: The main input of a model that reads text.
TEXT = "input_ids"
#: What forward calls its cache; transformers 5.24 renamed it.
CACHES = ("past_key_values", "cache")
#: Where the number of rows and of new tokens is read, in this order.
INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds",
          "hidden_states")  # fmt: skip


class Border:
    """What crosses the border of a method of a model."""

    def before(self, owner: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments to go on with.

        Args:
            owner: The model, or part of one, whose method is called.
            args: Positional arguments of the call, a tuple.
            kwargs: Keyword arguments of the call, a dict.
        """
        record_outputs(owner, kwargs)
        return args, kwargs

    def after(self, owner: Any, result: Any) -> None:
        """Look at the result."""


class CallBorder(Border):
    """What crosses the border of a model's call: its cache.

    Args:
        options: The options of the model.
    """

    def __init__(self, options: HealConfig) -> None:
        self.options = options
        self.warned = False

    def before(self, owner: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments to go on with.

        Raises:
            CacheError: A HealCache among them cannot take what the call brings.
        """
        args, kwargs = super().before(owner, args, kwargs)
        signature = inspect.signature(type(owner).forward)
        name = next((name for name in CACHES if name in signature.parameters), None)
        if name is None:
            return args, kwargs
        given = _bound(signature, args, kwargs)
        rows, tokens = _extent(given)
        for cache in [value for value in given.values() if isinstance(value, Cache)]:
            for part in healed_parts(cache):
                part.check_call(rows, tokens)
            self._warn_of_rounding(owner, cache)
        if given.get(name) is None and rows and _makes_cache(owner, given):
            kv = "fp32" if _needs_gradient(owner, given) else self.options.attention_format
            crossed = given.get("encoder_hidden_states") is not None
            kwargs = kwargs | {name: own_cache(owner, kv, (rows, tokens), crossed=crossed)}
        return args, kwargs

    def after(self, owner: Any, result: Any) -> None:
        """Give keys and values in a cache of transformers the dtype that the model expects back.

        What an entry hands out is FP32; the next call would mix it with 16-bit states.
        """
        values = result.values() if isinstance(result, dict) else result
        for cache in values if isinstance(values, Iterable) else ():
            for part in _parts(cache) if isinstance(cache, Cache) else ():
                _narrow_layers(part, owner.dtype)

    def _warn_of_rounding(self, owner: Any, cache: Any) -> None:
        parts = _parts(cache)
        rounds = any(type(part) in (DynamicCache, StaticCache) for part in parts)
        if rounds and owner.dtype.itemsize < 4 and not self.warned:
            self.warned = True
            warnings.warn(
                f"{type(owner).__name__} was given a {type(cache).__name__}, which rounds keys "
                f"and values to {owner.dtype}: results may depend on the batch. Pass "
                "HealCache(model.config), or no cache: the one that is handed out as "
                "past_key_values is a HealCache then.",
                stacklevel=4,
            )


def record_outputs(owner: Any, kwargs: dict[str, Any]) -> None:
    """Install the hooks that hidden states and attentions are taken from, if any are wanted.

    transformers installs them in the first call that needs them, which breaks the graph of that
    call. Parts that do not take text are asked for hidden states by the model that holds them.
    """
    wanted = any(name.startswith("output_") and value for name, value in kwargs.items())
    registry = getattr(output_capturing, "_CAN_RECORD_REGISTRY", {})  # private
    for part in owner.modules():
        inside = part is not owner and getattr(part, "main_input_name", TEXT) != TEXT
        if not isinstance(part, PreTrainedModel) or registry.get(part) is None:
            continue
        if wanted or inside or _records(part.config):
            output_capturing.maybe_install_capturing_hooks(part)


def _records(config: Any) -> bool:
    return bool(config.output_hidden_states or getattr(config, "output_attentions", False))


def _makes_cache(owner: Any, given: dict[str, Any]) -> bool:
    """Whether the model would make a cache for this call, one that is of use afterwards."""
    if given.get("use_cache") is not None:
        return bool(given["use_cache"])
    if not issubclass(type(owner), GenerationMixin) or not owner.can_generate():
        return False
    config = owner.config.get_text_config(decoder=True)
    training = owner.training or (torch.is_grad_enabled() and given.get("labels") is not None)
    return bool(getattr(config, "use_cache", False)) and not training


def _needs_gradient(owner: Any, given: dict[str, Any]) -> bool:
    """Whether keys and values carry a gradient, which integers cannot."""
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    return torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (*tensors, *owner.parameters())
    )


def healed_parts(cache: Any) -> Iterator[HealCache]:
    """The HealCaches of a cache: itself, or those for the decoder's own tokens."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if isinstance(own, HealCache):
        yield own


def _narrow_layers(cache: Any, dtype: torch.dtype) -> None:
    if isinstance(cache, HealCache) or dtype.itemsize >= 4:
        return
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name, None)
            if isinstance(states, torch.Tensor) and states.dtype == torch.float32:
                setattr(layer, name, states.to(dtype))


def _parts(cache: Any) -> list[Any]:
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


def _bound(signature: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name; those that do not fit are the model's to refuse."""
    names = list(signature.parameters)[1 : len(args) + 1]
    return dict(zip(names, args, strict=False)) | kwargs


def _extent(given: dict[str, Any]) -> tuple[int, int]:
    """Rows and new tokens of a call, zeros where it has no tokens."""
    for name in INPUTS:
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    return 0, 0
