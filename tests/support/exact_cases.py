"""Exact products, sums, attentions to show: what `tests.sass` prints, what tests compile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.ops.attention.scoring import Scoring
from tests.support.exact_gpu import source
from tests.support.fake_cuda import Kernel, kernels

BF16, FP32 = torch.bfloat16, torch.float32


def empty(*size: int, dtype: torch.dtype = FP32) -> Tensor:
    """A meta tensor."""
    return torch.empty(size, dtype=dtype, device="meta")


@dataclass(frozen=True)
class ExactCase:
    """A product `[(batch,) m, k] @ [(batch,) k, n]`, B stored as a linear layer has it."""

    title: str
    m: int
    n: int
    k: int
    b: torch.dtype = BF16
    numerics: str = "exact5"
    batch: int | None = None

    def tensors(self) -> list[Tensor]:
        """Meta tensors of the operands."""
        lead = [] if self.batch is None else [self.batch]
        return [empty(*lead, self.m, self.k), empty(*lead, self.n, self.k, dtype=self.b)]

    def __call__(self, a: Tensor, b: Tensor) -> tuple[Tensor]:
        """The product, as a graph has it."""
        op = torch.ops.heal.mm if self.batch is None else torch.ops.heal.bmm
        return (op(a, b.mT, self.numerics),)

    def templates(self, capability: int = 90) -> list[Kernel]:
        """The template kernel that Inductor generates for this product."""
        return _templates(self, capability)


@dataclass(frozen=True)
class ExactAttentionCase:
    """An attention of 32 query heads and 8 key heads."""

    title: str
    length: int
    keys: int
    head_size: int
    kv: str = "int16"
    batch: int = 1

    def tensors(self) -> list[Tensor]:
        """Meta tensors of digits and scales."""
        planes, found = {"int16": 2, "int24": 3}[self.kv], []
        for heads, rows in ((32, self.length), (8, self.keys), (8, self.keys)):
            size = (self.batch, heads, planes, rows, self.head_size)
            found += [empty(*size, dtype=torch.int8), empty(self.batch, heads, rows)]
        return found

    def __call__(self, *states: Tensor) -> tuple[Tensor]:
        """The operator, as a graph has it."""
        scoring = Scoring(self.head_size**-0.5, is_causal=self.length > 1)
        return (torch.ops.heal.integer_attention(*states, *scoring.arguments, "exact5")[0],)

    def templates(self, capability: int = 90) -> list[Kernel]:
        """The kernels of the two passes."""
        return _templates(self, capability)


@dataclass(frozen=True)
class ExactSumsCase:
    """Scores in integers, `[heads, rows, size] @ [heads, size, keys]`, K stored as it comes."""

    title: str
    rows: int
    keys: int
    head_size: int
    digits: int = 2

    def tensors(self) -> list[Tensor]:
        """Meta tensors of the planes of both."""
        lengths = [self.rows] * self.digits + [self.keys] * self.digits
        return [empty(8, length, self.head_size, dtype=torch.int8) for length in lengths]

    def __call__(self, *planes: Tensor) -> tuple[Tensor]:
        """The operator, as a graph has it."""
        left, right = planes[: self.digits], planes[self.digits :]
        return (torch.ops.heal.digit_sums(left, [plane.mT for plane in right], 0),)

    def templates(self, capability: int = 90) -> list[Kernel]:
        """The template kernel that Inductor generates for this product."""
        return _templates(self, capability)


@dataclass(frozen=True)
class ExactGroupsCase:
    """Rows of eight groups, each with a matrix of its own; or the gradient of those matrices."""

    title: str
    rows: int
    n: int
    k: int
    ragged: bool = False

    def tensors(self) -> list[Tensor]:
        """Meta tensors of activations, of weights (or gradients), and of where groups end."""
        right = (self.rows, self.n) if self.ragged else (8, self.n, self.k)
        dtype = FP32 if self.ragged else BF16
        return [
            empty(self.rows, self.k), empty(*right, dtype=dtype), empty(8, dtype=torch.int32)
        ]  # fmt: skip

    def __call__(self, a: Tensor, b: Tensor, offs: Tensor) -> tuple[Tensor]:
        """The operator, as a graph has it."""
        a, b = (a.t(), b) if self.ragged else (a, b.mT)
        return (torch.ops.heal.grouped_mm(a, b, offs, "exact5"),)

    def templates(self, capability: int = 90) -> list[Kernel]:
        """The template kernel that Inductor generates for this product."""
        return _templates(self, capability)


def _templates(
    case: ExactCase | ExactAttentionCase | ExactGroupsCase | ExactSumsCase, capability: int
) -> list[Kernel]:
    found = kernels(source(case, case.tensors(), capability))
    return [kernel for kernel in found if kernel.is_template]


#: Llama-3-8B's sizes, SmolLM2's head size.
CASES = (
    ExactCase("exact prefill", 2048, 4096, 4096),
    ExactCase("exact prefill, 8 products", 2048, 4096, 4096, b=FP32, numerics="exact8"),
    ExactCase("exact batched", 512, 512, 64, b=FP32, batch=8),
    ExactCase("exact decode", 1, 4096, 4096),
    ExactCase("exact decode, FP32 weight", 8, 4096, 4096, b=FP32),
    ExactGroupsCase("exact routed rows", 4096, 4096, 2048),
    ExactGroupsCase("exact routed decode", 16, 4096, 2048),
    ExactGroupsCase("exact routed gradient", 4096, 4096, 2048, ragged=True),
    ExactSumsCase("exact scores 128", 8192, 2048, 128),
    ExactSumsCase("exact scores 128, int24", 8192, 2048, 128, 3),
    ExactAttentionCase("exact attention 128", 2048, 2048, 128),
    ExactAttentionCase("exact attention 64", 2048, 2048, 64),
    ExactAttentionCase("exact attention 128, int24", 2048, 2048, 128, "int24"),
    ExactAttentionCase("exact attention decode 128", 1, 8192, 128),
    ExactAttentionCase("exact attention decode 64", 1, 8192, 64),
)
