"""A contender made ready in its own process: weights loaded, attention set, compiler attached.

Layer: bench. Imports `bench.contenders`, `bench.source` and `integrations`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from healpass.bench.contenders import Contender
from healpass.bench.source import Source

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
        self.device = device
        self.dtype = getattr(torch, contender.dtype)
        loaded = source.load(torch.float32 if contender.upcast else self.dtype)
        self.module = (_upcasting(loaded) if contender.upcast else loaded).to(device)
        self.config: Any = getattr(loaded, "config", None)
        if self.config is not None and contender.cache != "traced" and not contender.upcast:
            self._attend_as_the_cache_wants()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as this contender runs it; shapes are constants to every compiler.

        Whole graphs are asked for: torch would run a part of the function eagerly, and all of it
        past its limit of recompilations, without an error.
        """
        compiler = self.contender.compiler
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
        wide = self.contender.compiler == "heal" or self.contender.upcast
        return torch.float32 if wide else self.dtype

    @cached_property
    def cache(self) -> Any:
        """An empty static cache for one sequence, in the contender's format, in place already."""
        from transformers import StaticCache

        from healpass.integrations.transformers import HealCache

        if self.contender.cache == "traced" or self.contender.upcast:
            made: Any = StaticCache(config=self.config, max_cache_len=ROOM)
        else:
            made = HealCache(self.config, ROOM, self.contender.cache)
        heads = self.config.num_key_value_heads
        made.early_initialization(1, heads, self.head_size, self.activation_dtype, self.device)
        return made

    @property
    def head_size(self) -> int:
        """Size of one attention head of a language model."""
        shared = self.config.hidden_size // self.config.num_attention_heads
        return int(getattr(self.config, "head_dim", None) or shared)

    def _attend_as_the_cache_wants(self) -> None:
        from healpass.integrations.transformers import register

        register()
        names = {"int16": "heal", "int24": "heal_int24", "fp32": "heal_fp32"}
        module: Any = self.module
        module.set_attn_implementation(names[self.contender.cache])


class UpcastLinear(nn.Module):
    """LayerCast as published: the weight stays BF16 and is upcast for one FP32 product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.to(torch.bfloat16))
        self.bias = linear.bias

    def forward(self, activation: Tensor) -> Tensor:
        """Multiply `[..., K]` by the upcast weight `[N, K]`."""
        return F.linear(activation, self.weight.float(), self.bias)


class UpcastEmbedding(nn.Module):
    """The table in BF16, its rows handed out in FP32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.to(torch.bfloat16))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up `[...]` ids, giving `[..., N]`."""
        return F.embedding(ids, self.weight).float()


def _upcasting(module: nn.Module) -> nn.Module:
    """Put the two modules above in place of torch's; weights that were tied stay tied."""
    wide: dict[type, Any] = {nn.Linear: UpcastLinear, nn.Embedding: UpcastEmbedding}
    ours: dict[nn.Parameter, nn.Parameter] = {}
    for name, child in list(module.named_modules()):
        if type(child) in wide:
            new = wide[type(child)](child)
            new.weight = ours.setdefault(child.weight, new.weight)
            module.set_submodule(name, new)
    return module


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
