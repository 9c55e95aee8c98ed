"""The exact templates' part of `selfcheck`: small problems, and zero differing bits.

The right bits are those of the operators' reference implementation on CPU. May import `checking`,
and the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.lowering.cuda.checking import each
from healpass.ops.attention.scoring import Scoring

GEMM, BATCHED, SUMS = "exact_gemm", "exact_gemm_batched", "exact_sums"
ROUTED, RAGGED = "exact_grouped", "exact_grouped_sum"
ATTENTION = ("exact_attention_tops", "exact_attention_sums")


@dataclass(frozen=True)
class ExactProduct:
    """A product through one template; with `spoiled` it meets infinities and NaN."""

    templates: tuple[str, ...]
    right: torch.dtype
    rows: int
    columns: int = 304
    terms: int = 208
    numerics: str = "exact5"
    spoiled: bool = False

    def operands(self) -> list[Tensor]:
        """Rows and columns that differ in magnitude by 2^20; B lies as a linear layer has it."""
        generator = torch.Generator().manual_seed(0)
        lead = (2,) if BATCHED in self.templates else ()
        a = torch.randn(*lead, self.rows, self.terms, generator=generator)
        b = torch.randn(*lead, self.columns, self.terms, generator=generator)
        a *= 2.0 ** torch.randint(-10, 11, (self.rows, 1), generator=generator)
        b *= 2.0 ** torch.randint(-10, 11, (self.columns, 1), generator=generator)
        if self.spoiled:
            a.view(-1)[5], a.view(-1)[self.terms + 7], b.view(-1)[3] = (
                math.nan,
                math.inf,
                -math.inf,
            )
        return [a, b.to(self.right).mT]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The product."""
        multiply = torch.ops.heal.mm if a.dim() == 2 else torch.ops.heal.bmm
        return multiply(a, b, self.numerics)


@dataclass(frozen=True)
class ExactGroups:
    """Products of three groups, one of them empty, and a rest that is in none."""

    templates: tuple[str, ...]
    right: torch.dtype
    length: int = 150
    spoiled: bool = False

    def operands(self) -> list[Tensor]:
        """`[length, 70]` with `[3, 70, 40]`, or `[70, length]` with `[length, 40]`; offsets."""
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(self.length, 70, generator=generator)
        a *= 2.0 ** torch.randint(-10, 11, (self.length, 1), generator=generator)
        routed = ROUTED in self.templates
        b = torch.randn(*((3, 70) if routed else (self.length,)), 40, generator=generator)
        if self.spoiled:
            a.view(-1)[5], b.view(-1)[3] = math.nan, -math.inf
        ends = torch.tensor([self.length // 3, self.length // 3, self.length - 5])
        return [a if routed else a.t(), b.to(self.right), ends.to(torch.int32)]

    def __call__(self, a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        """The products."""
        return torch.ops.heal.grouped_mm(a, b, offs, "exact5")


@dataclass(frozen=True)
class ExactSums:
    """Sums of products of digits, the largest ones in the first row and column."""

    digits: tuple[int, int]
    cut: int
    terms: int
    templates: tuple[str, ...] = (SUMS,)

    def operands(self) -> list[Tensor]:
        """Planes `[2, 70, terms]` and `[2, 40, terms]` INT8."""
        generator = torch.Generator().manual_seed(0)
        rows = [70] * self.digits[0] + [40] * self.digits[1]
        planes = [torch.randint(-128, 128, (2, n, self.terms), generator=generator) for n in rows]
        for plane in planes:
            plane[:, 0] = -128
        return [plane.to(torch.int8) for plane in planes]

    def __call__(self, *planes: Tensor) -> Tensor:
        """The integers."""
        left, right = planes[: self.digits[0]], planes[self.digits[0] :]
        return torch.ops.heal.digit_sums(left, [plane.mT for plane in right], self.cut)


@dataclass(frozen=True)
class ExactAttention:
    """An attention through both of its templates: three query heads per key head, a mask."""

    kv: str
    length: int
    keys: int
    head_size: int = 16
    templates: tuple[str, ...] = ATTENTION

    def operands(self) -> list[Tensor]:
        """Q, K and V, and a mask that hides some keys."""
        generator = torch.Generator().manual_seed(0)
        sizes = ((2, 3, self.length), (2, 1, self.keys), (2, 1, self.keys))
        states = [torch.randn(*size, self.head_size, generator=generator) * 2 for size in sizes]
        mask = torch.randn(self.length, self.keys, generator=generator)
        return [*states, mask.masked_fill(mask > 1, -math.inf)]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """The attention."""
        scoring = Scoring(self.head_size**-0.5, mask)
        digits = [
            part for x in (query, key, value) for part in torch.ops.heal.quantize(x, self.kv)
        ]
        output, _ = torch.ops.heal.integer_attention(*digits, *scoring.arguments, "exact5")
        return output


Check = ExactProduct | ExactGroups | ExactSums | ExactAttention
#: What a check gives when it runs somewhere.
Run = Callable[[Check], Tensor]


def checks() -> Iterator[Check]:
    """Every template, with every form of operand that it has."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for weight in (bf16, fp16, fp32):
        yield ExactProduct((GEMM,), weight, 5)
        yield ExactProduct((GEMM,), weight, 300)
    for numerics in ("exact3", "exact6", "exact8"):
        yield ExactProduct((GEMM,), fp32, 150, numerics=numerics)
    for rows in (5, 70):
        yield ExactProduct((GEMM,), bf16, rows, columns=33, terms=131, spoiled=True)
    yield ExactProduct((GEMM,), bf16, 70, columns=40, terms=70_000)  # past INT32: split
    yield ExactProduct((BATCHED,), fp32, 70)
    for spoiled in (False, True):
        yield ExactGroups((ROUTED,), bf16, spoiled=spoiled)
        yield ExactGroups((RAGGED,), fp32, spoiled=spoiled)
    yield ExactGroups((ROUTED,), bf16, length=20)  # few rows: matrices are cut as they are read
    yield ExactSums((2, 2), 0, 128)
    yield ExactSums((3, 3), 0, 131)
    yield ExactSums((3, 2), 1, 70_000)  # past INT32: split
    for kv in ("int16", "int24"):
        yield ExactAttention(kv, length=70, keys=70)
        yield ExactAttention(kv, length=1, keys=600)
    yield ExactAttention("int16", length=40, keys=70, head_size=128)


def faults(check: Check, found: Tensor) -> dict[str, str]:
    """What is wrong with what a check gave, by template."""
    wanted = check(*check.operands())
    bits = int((found.cpu().view(torch.int32) != wanted.view(torch.int32)).sum())
    said = f"{check}: {bits} of {wanted.numel()} elements have other bits"
    return dict.fromkeys(check.templates, said) if bits else {}


def examine(run: Run, chosen: Iterable[Check] | None = None) -> dict[str, str]:
    """Run every check, or the chosen ones; what is wrong, by template."""
    return each(checks() if chosen is None else chosen, run, faults)


def together(device: str) -> Callable[[Sequence[Check]], Sequence[Tensor]]:
    """Run checks through compiled code on a device, all in one graph."""

    def run(chosen: Sequence[Check]) -> Sequence[Tensor]:
        def everything(*operands: Sequence[Tensor]) -> list[Tensor]:
            return [check(*call) for check, call in zip(chosen, operands, strict=True)]

        torch._dynamo.reset()
        # By name, because this layer lies below the backend: its settings belong to the promise.
        compiled = torch.compile(
            everything, backend="heal", dynamic=False, options={"precision": "exact"}
        )
        operands = [[x.to(device) for x in check.operands()] for check in chosen]
        results: list[Tensor] = compiled(*operands)
        return results

    return run


def on_gpu(index: int) -> Run:
    """Run through compiled code on a GPU, compiled anew for every check."""
    run = together(f"cuda:{index}")
    return lambda check: run([check])[0]
