"""The matmul templates' part of `selfcheck`: small products, compared with FP64.

A result has to keep the promise of the operator, |error| <= 2 K u |a| @ |b| with u = 2^-24. May
import `checking`, and the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.lowering.cuda.checking import each

#: Multiplies two matrices (or batches) with the given `numerics`.
Multiply = Callable[[Tensor, Tensor, str], Tensor]

UNIT = 2.0**-24


@dataclass(frozen=True)
class Problem:
    """A small product that goes through one template."""

    template: str
    a: torch.dtype
    b: torch.dtype
    rows: int
    columns: int = 304
    terms: int = 72
    numerics: str = "heal"

    @property
    def templates(self) -> tuple[str, ...]:
        """As every check has them."""
        return (self.template,)

    def operands(self) -> tuple[Tensor, Tensor]:
        """Operands with a heavy tail: rows and columns differ in magnitude by 2^20."""
        generator = torch.Generator().manual_seed(0)
        lead = (2,) if self.template.endswith("_batched") else ()
        groups = (2,) if self.template == "grouped" else lead
        a = torch.randn(*lead, self.rows, self.terms, generator=generator)
        b = torch.randn(*groups, self.terms, self.columns, generator=generator)
        a *= 2.0 ** torch.randint(-10, 11, a.shape[:-1], generator=generator)[..., None]
        b *= 2.0 ** torch.randint(-10, 11, (self.columns,), generator=generator)
        return a.to(self.a), b.to(self.b)


def checks() -> Iterator[Problem]:
    """Every template, with every form of operand that it has.

    Sums are short where they can be: the promise 2 K u is then tight enough to notice TF32.
    (Seen: Triton 3.6 compiles an "ieee" dot of FP32 operands to TF32 on sm_100.)
    """
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for weight in (bf16, fp16, fp32):
        yield Problem("decode", fp32, weight, 5)
        yield Problem("gemm", fp32, weight, 300)
    yield Problem("gemm", fp32, bf16, 70)
    yield Problem("gemm", fp32, bf16, 70, columns=70)
    yield Problem("gemm", fp32, bf16, 300, columns=301)  # too odd for the copy engine
    yield Problem("decode", fp32, bf16, 5, terms=1000)
    yield Problem("gemm", bf16, bf16, 300)
    yield Problem("gemm_batched", fp32, fp32, 70)
    yield Problem("grouped", fp32, bf16, 70)
    yield Problem("invariant", fp32, bf16, 70, numerics="heal:::m_invariant")
    yield Problem("decode", fp32, bf16, 5, numerics="layercast")
    yield Problem("layercast", fp32, bf16, 70, numerics="layercast")
    yield Problem("layercast_batched", fp32, fp32, 70, numerics="layercast")


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; a matrix by a batch is a product per group of rows, the groups being equal."""
    if a.dim() == b.dim():
        return a @ b
    return (a.reshape(b.shape[0], -1, a.shape[1]) @ b).flatten(0, 1)


def faults(problem: Problem, found: Tensor) -> dict[str, str]:
    """What is wrong with a product, by template."""
    left, right = (x.double() for x in problem.operands())
    error = (found.double().cpu() - product(left, right)).abs()
    bound = 2 * problem.terms * UNIT * product(left.abs(), right.abs())
    worst = (error / bound).max().item()
    if worst <= 1:
        return {}
    return {problem.template: f"{problem}: observed / bound = {worst:.3g}"}


def examine(multiply: Multiply, chosen: Iterable[Problem] | None = None) -> dict[str, str]:
    """Run every problem, or the chosen ones; what is wrong, by template."""

    def run(problem: Problem) -> Tensor:
        return multiply(*problem.operands(), problem.numerics)

    return each(checks() if chosen is None else chosen, run, faults)


def _multiply(a: Tensor, b: Tensor, numerics: str) -> Tensor:
    """As `product`, by the operators."""
    result: Tensor
    if a.dim() == b.dim():
        op = torch.ops.heal.mm if a.dim() == 2 else torch.ops.heal.bmm
        result = op(a, b, numerics)
        return result
    rows = a.shape[0] // b.shape[0]
    ends = torch.arange(rows, a.shape[0] + 1, rows, dtype=torch.int32, device=a.device)
    result = torch.ops.heal.grouped_mm(a, b, ends, numerics)
    return result


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    from healpass import lowering

    lowering.register()
    # Inductor's cache knows neither our sources nor a tile that a test has changed.
    options: dict[str, Any] = {"fx_graph_cache": False}
    compiled: Callable[..., object] = torch.compile(
        function, fullgraph=True, dynamic=False, options=options
    )
    return compiled


def on_gpu(index: int, *, fresh: bool = True) -> Multiply:
    """Multiply as `product` through compiled code on a GPU; `fresh` compiles anew each time."""
    compiled = _compiled(_multiply)

    def multiply(a: Tensor, b: Tensor, numerics: str) -> Tensor:
        if fresh:
            torch._dynamo.reset()
        result = compiled(a.to(f"cuda:{index}"), b.to(f"cuda:{index}"), numerics)
        assert isinstance(result, Tensor)
        return result

    return multiply


def together(device: str) -> Callable[[Sequence[Problem]], Sequence[Tensor]]:
    """Run problems on a device, all in one graph: Inductor compiles its kernels side by side."""

    def products(problems: Sequence[Problem], *operands: Tensor) -> list[Tensor]:
        pairs = zip(problems, operands[::2], operands[1::2], strict=True)
        return [_multiply(a, b, problem.numerics) for problem, a, b in pairs]

    def run(problems: Sequence[Problem]) -> Sequence[Tensor]:
        torch._dynamo.reset()
        operands = [x.to(device) for problem in problems for x in problem.operands()]
        found = _compiled(functools.partial(products, list(problems)))(*operands)
        assert isinstance(found, list)
        return found

    return run
