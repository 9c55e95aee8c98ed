"""A contender made ready in its own process: weights loaded, attention set, compiler attached.

Layer: bench. Imports `bench.contenders`, `bench.products`, `bench.source` and `integrations`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from healpass.bench.contenders import Contender
from healpass.bench.source import HEADS, Heads, ShapesSource, Source

#: Tokens that a cache has room for.
ROOM = 1024


class Subject:
    """One contender's module and how it is called.

    Args:
        contender: Who.
        source: What to load.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, contender: Contender, source: Source, device: str) -> None:
        self.contender = contender
        self.source = source
        self.device = device
        self.dtype = getattr(torch, contender.dtype)
        loaded = source.load(torch.float32 if contender.wide else self.dtype)
        self.module = _with_layers_of(contender, loaded).to(device)
        self.config: Any = getattr(loaded, "config", None)
        if self.config is not None and contender.has_heal_cache:
            self._attend_as_the_cache_wants()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as this contender runs it; shapes are constants to every compiler.

        Whole graphs are asked for: torch would run a part of the function eagerly, and all of it
        past its limit of recompilations, without an error.
        """
        compiler = self.contender.compiler
        if self.contender.attention == "flash":
            return _with_flash_alone(function)
        if compiler == "eager":
            return function
        settings: dict[str, Any] = {"dynamic": False, "fullgraph": True}
        if compiler == "heal":
            settings |= {"backend": "heal", "options": dict(self.contender.options)}
        return torch.compile(function, **settings)

    @cached_property
    def step(self) -> Callable[[Tensor], Tensor]:
        """`[1, L]` token ids -> the last token's logits `[1, V]`; the cache is written.

        One function and one cache for all workloads, which so share compiled code.
        """
        model: Any = self.module

        def step(ids: Tensor, cache: Any) -> Tensor:
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1]

        compiled = self.compile(step)
        return lambda ids: compiled(ids, self.cache)

    @property
    def activation_dtype(self) -> torch.dtype:
        """What an input that is not token ids comes in: HEAL takes FP32, whatever the weights."""
        wide = self.contender.compiler == "heal" or self.contender.wide
        return torch.float32 if wide else self.dtype

    @cached_property
    def cache(self) -> Any:
        """An empty cache for one sequence, in the contender's format; a static one is in place."""
        from transformers import DynamicCache, StaticCache

        from healpass.integrations.transformers import HealCache

        if self.contender.cache == "growing":
            return DynamicCache(config=self.config)
        if self.contender.has_heal_cache:
            made: Any = HealCache(self.config, ROOM, self.contender.cache)
        else:
            made = StaticCache(config=self.config, max_cache_len=ROOM)
        heads = self.heads
        made.early_initialization(1, heads.keys, heads.size, self.activation_dtype, self.device)
        return made

    @property
    def heads(self) -> Heads:
        """Attention heads of the language model, or of the one whose layers these are."""
        if isinstance(self.source, ShapesSource):
            return HEADS[self.source.name]
        config = self.config
        shared = config.hidden_size // config.num_attention_heads
        size = getattr(config, "head_dim", None) or shared
        return Heads(config.num_attention_heads, config.num_key_value_heads, int(size))

    def _attend_as_the_cache_wants(self) -> None:
        from healpass.integrations.transformers import register

        register()
        names = {"int16": "heal", "int24": "heal_int24", "fp32": "heal_fp32"}
        module: Any = self.module
        module.set_attn_implementation(names[self.contender.cache])


class Linear16(nn.Module):
    """A linear layer whose weight stays BF16, multiplied in a contender's own way."""

    def __init__(self, linear: nn.Linear, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.to(torch.bfloat16))
        self.bias = linear.bias
        self.product = product

    def forward(self, activation: Tensor) -> Tensor:
        """Multiply `[..., K]` by the weight `[N, K]`."""
        multiplied = self.product(activation, self.weight)
        return multiplied if self.bias is None else multiplied + self.bias


def upcast_product(activation: Tensor, weight: Tensor) -> Tensor:
    """LayerCast as published: the weight `[N, K]` is upcast for one FP32 product."""
    return F.linear(activation, weight.float())


class UpcastEmbedding(nn.Module):
    """The table in BF16, its rows handed out in FP32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.to(torch.bfloat16))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up `[...]` ids, giving `[..., N]`."""
        return F.embedding(ids, self.weight).float()


def _with_layers_of(contender: Contender, module: nn.Module) -> nn.Module:
    """Put the contender's layers in place of torch's; weights that were tied stay tied."""
    if contender.linear == "torch":
        return module
    product = upcast_product
    if contender.is_triton:
        from healpass.bench.products import PRODUCTS

        product = PRODUCTS[contender.linear]
    made: dict[type, Callable[[Any], Any]] = {nn.Linear: lambda layer: Linear16(layer, product)}
    if contender.wide:
        made[nn.Embedding] = UpcastEmbedding
    ours: dict[Any, Any] = {}
    for name, child in list(module.named_modules()):
        if type(child) in made:
            new = made[type(child)](child)
            new.weight = ours.setdefault(child.weight, new.weight)
            module.set_submodule(name, new)
        elif isinstance(child, nn.Embedding):
            ours.setdefault(child.weight, child.weight)
    return module


def _with_flash_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function run eagerly with flash attention; torch raises where that cannot compute it."""

    def run(*arguments: Any) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return function(*arguments)

    return run


def held_bytes() -> int:
    """Bytes of every tensor that this process holds now: weights, packed copies, caches."""
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and _has_memory(found):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _has_memory(found: Tensor) -> bool:
    """Whether a tensor is a real one: compilers keep fake ones."""
    real = type(found) in (Tensor, nn.Parameter)
    return real and found.device.type in ("cpu", "cuda") and found.layout == torch.strided
