"""Attention problems whose kernels the tests look at, and what Inductor makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.fake_cuda import Device, Kernel, generated_source, kernels

PLANES = {"int16": 2, "int24": 3}


@dataclass(frozen=True)
class Scoring:
    """The arguments of `heal::integer_attention` after the operands."""

    is_causal: bool = False
    scale: float = 0.125
    window: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    numerics: str = "heal"

    def arguments(self) -> tuple[Any, ...]:
        """In the operator's order."""
        return (
            self.is_causal, self.scale, self.window, self.softcap, self.dropout_p, self.numerics,
        )  # fmt: skip


@dataclass(frozen=True)
class AttentionCase:
    """An attention to show: `[batch, heads, length, head_size]` against `keys` keys."""

    title: str
    length: int
    keys: int
    head_size: int = 128
    value_size: int | None = None
    heads: int = 32
    key_heads: int = 8
    batch: int = 1
    kv: str = "int16"
    mask: torch.dtype | None = None
    scoring: Scoring = Scoring()
    backward: bool = False

    def tensors(self) -> list[Tensor]:
        """Meta tensors: Q, K, V (digits, scales); around them what `backward` adds; a mask."""
        value_size = self.value_size or self.head_size
        found = []
        for heads, rows, size in (
            (self.heads, self.length, self.head_size),
            (self.key_heads, self.keys, self.head_size),
            (self.key_heads, self.keys, value_size),
        ):
            if self.kv == "fp32":
                found.append(torch.empty(self.batch, heads, rows, size, device="meta"))
                continue
            digits = (self.batch, heads, PLANES[self.kv], rows, size)
            found.append(torch.empty(digits, dtype=torch.int8, device="meta"))
            found.append(torch.empty(self.batch, heads, rows, device="meta"))
        if self.backward:
            output = torch.empty(self.batch, self.heads, self.length, value_size, device="meta")
            found = [output, *found, output, output[..., 0].contiguous()]
        if self.mask is not None:
            shape = (self.batch, 1, self.length, self.keys)
            found.append(torch.empty(shape, dtype=self.mask, device="meta"))
        return found

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The operator, as a graph has it."""
        rest = list(tensors)
        mask = None if self.mask is None else rest.pop()
        name = "attention" if self.kv == "fp32" else "integer_attention"
        extra = (mask, None, None, *self.scoring.arguments())
        if self.backward:
            grad, *states, output, logsumexp = rest
            call = (grad, *states, *extra, output, logsumexp)
            return getattr(torch.ops.heal, f"{name}_backward")(*call)
        return getattr(torch.ops.heal, name)(*rest, *extra)

    def templates(self, capability: int = 90) -> list[Kernel]:
        """The template kernels that Inductor generates for it, in order."""
        source = generated_source(self, self.tensors(), Device(capability))
        return [kernel for kernel in kernels(source) if kernel.is_template]


CAUSAL = Scoring(is_causal=True)
#: Llama-3-8B's heads, SmolLM2's head size, and the largest. Decode has two kernels: parts, merge;
#: backward two: for Q, for K and V.
CASES = (
    AttentionCase("attention 128", 2048, 2048, scoring=CAUSAL),
    AttentionCase("attention 64", 2048, 2048, 64, scoring=CAUSAL),
    AttentionCase("attention 256", 2048, 2048, 256, scoring=CAUSAL),
    AttentionCase("attention 128, int24", 2048, 2048, kv="int24", scoring=CAUSAL),
    AttentionCase("attention 128, fp32", 2048, 2048, kv="fp32", scoring=CAUSAL),
    AttentionCase("attention 256, fp32", 2048, 2048, 256, kv="fp32", scoring=CAUSAL),
    AttentionCase(
        "attention 128, invariant",
        2048,
        2048,
        scoring=Scoring(True, numerics="heal:::m_invariant"),
    ),
    AttentionCase("decode 128", 1, 8192, mask=torch.bool),
    AttentionCase("decode 64", 1, 8192, 64),
    AttentionCase("decode 256", 1, 8192, 256),
    AttentionCase("decode 128, int24", 1, 8192, kv="int24"),
    AttentionCase("decode 128, fp32", 1, 8192, kv="fp32"),
    AttentionCase("backward 128", 2048, 2048, scoring=CAUSAL, backward=True),
    AttentionCase("backward 64", 2048, 2048, 64, scoring=CAUSAL, backward=True),
    AttentionCase("backward 256", 2048, 2048, 256, scoring=CAUSAL, backward=True),
    AttentionCase("backward 128, int24", 2048, 2048, kv="int24", scoring=CAUSAL, backward=True),
    AttentionCase("backward 128, fp32", 2048, 2048, kv="fp32", scoring=CAUSAL, backward=True),
    AttentionCase("backward 256, fp32", 2048, 2048, 256, kv="fp32", scoring=CAUSAL, backward=True),
)
