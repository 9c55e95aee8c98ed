"""Products of an exact precision on CUDA: digits as a graph, one template.

May import `compat`, `exact_tiles`, `kernels`, `matmul` (its limits), `selfcheck`.
`DECOMPOSITIONS` opens products into the graphs of `products.digits`, so Inductor fuses the
cutting with what produced an operand; what is left becomes the template: `heal::digit_mm` (of
`heal::mm` and `heal::bmm`), `heal::digit_grouped_mm` (of `heal::grouped_mm`) and, the same without
its rounding, `heal::digit_sums` (of `heal::weighted_sum` and `heal::mm_partial`).

No knob can change a bit, because every accumulator holds its sums exactly. Here that is proved per
shape: `terms` is how many terms of K a level of digit products may add, and K is split there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import lowerings

from healpass.arithmetic.digits import (
    DIGIT_MAX,
    FP32_ACCUMULATOR,
    INT32_ACCUMULATOR,
    exact_terms,
)
from healpass.lowering import compat
from healpass.lowering.cuda import kernels, selfcheck
from healpass.lowering.cuda.exact_tiles import ExactTile, exact_tiles, prefers_half
from healpass.lowering.cuda.matmul import LOWEST_CAPABILITY, TMA_CAPABILITY
from healpass.ops.products.digits import (
    by_digits,
    digit_sums,
    groups_by_digits,
    partial_by_digits,
)
from healpass.ops.products.exact import MOST_TERMS, Scheme, scheme
from healpass.ops.products.numerics import Numerics
from healpass.ops.products.weighted_sum import finite_sum

#: Tuning: up to here B is read by few tiles of rows, and cut into digits as it is read.
FEW_ROWS = 32

aten = torch.ops.aten


def digits_on_cuda(a: Tensor, b: Tensor, numerics: str = "heal") -> Tensor:
    """Decompose `heal::mm` and `heal::bmm`; NotImplemented leaves the operator as it is.

    Left are other precisions, simulated adders, other devices than GPUs with the template's
    instructions, and a K that the operator's reference implementation refuses.

    Args:
        a: `[(Q,) M, K]` in FP16, BF16 or FP32.
        b: `[(Q,) K, N]`, any of those.
        numerics: As `heal::mm` takes it.
    """
    products = _products(numerics, a)
    return NotImplemented if products is None else by_digits(a, b, products)


def groups_on_cuda(a: Tensor, b: Tensor, offs: Tensor, numerics: str = "heal") -> Tensor:
    """Decompose `heal::grouped_mm`; NotImplemented as above.

    Args:
        a: FP16, BF16 or FP32; ranks of both as `heal::grouped_mm` takes them.
        b: Any of those.
        offs: INT32 `[G]`, where each group ends.
        numerics: As `heal::grouped_mm` takes it.
    """
    products = _products(numerics, a)
    return NotImplemented if products is None else groups_by_digits(a, b, offs, products)


def partial_on_cuda(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, products: int
) -> Tensor:
    """Decompose `heal::mm_partial`, which is exact by definition; NotImplemented as above.

    Args:
        a: `[M, K]` in FP16, BF16 or FP32: a part of K.
        b: `[K, N]`, any of those.
        a_scale: FP32 `[M, 1]`, of the whole K.
        b_scale: FP32 `[1, N]`, of the whole K.
        products: 3, 5, 6 or 8.
    """
    if a.shape[-1] > MOST_TERMS or not has_kernels(a.device):
        return NotImplemented
    return partial_by_digits(a, b, a_scale, b_scale, products)


def _products(numerics: str, a: Tensor) -> int | None:
    """The scheme's number of digit products; None where a product stays as it is."""
    how = Numerics.parse(numerics)
    if how.simulate or how.order or a.shape[-1] > MOST_TERMS or not has_kernels(a.device):
        return None
    return how.products


def weighted_on_cuda(weights: Tensor, values: Tensor, numerics: str) -> Any:
    """Decompose `heal::weighted_sum`, which is exact by definition; NotImplemented as above.

    Args:
        weights: `[..., L, S]` in FP16, BF16 or FP32.
        values: `[..., S, E]`, any of those.
        numerics: An exact precision.
    """
    products = _products(numerics, weights)
    if products is None:
        return NotImplemented
    plan = scheme(products, values.dtype)
    p, v = (torch.where(x.isfinite(), x, 0.0) for x in (weights, values))
    result = finite_sum(p, v, plan, lambda a, b: digit_sums(a, b, plan.cut))
    marks = (
        torch.where(x.isfinite().all(dim, keepdim=True), 1.0, math.nan)
        for x, dim in ((weights, -1), (values, -2))
    )
    return torch.ops.heal.with_special(result, weights, values, *marks)


def has_kernels(device: torch.device) -> bool:
    """Whether the templates can run: an NVIDIA GPU from sm_80 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return capability(device) >= LOWEST_CAPABILITY


def capability(device: torch.device) -> int:
    """As 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def terms(plan: Scheme, *, half: bool) -> int:
    """How many terms of K a level may add: all pairs of digits with one i + j share it.

    A product of digits is at most 2^14; INT32 holds 2^31 - 1, an FP32 accumulator 2^24 exactly, on
    every generation and in any order (`arithmetic.digits`).
    """
    levels = [i + j for i, j in plan.pairs]
    shared = max(levels.count(level) for level in levels)
    accumulator = FP32_ACCUMULATOR if half else INT32_ACCUMULATOR
    return exact_terms(DIGIT_MAX, DIGIT_MAX, accumulator) // shared


@dataclass(frozen=True)
class DigitProblem:
    """One product of digits `[(batch,) m, k] @ [(batch,) k, n]`, planes K-contiguous.

    With `offs` there are groups: `[m, k] @ [groups, k, n]` if `routed`, else `[m, k] @ [k, n]`
    with a sum over K for each.
    """

    a_digits: list[ir.TensorBox]
    b_digits: list[ir.TensorBox]
    cut: int
    operands: tuple[ir.TensorBox, ...] = ()
    scales: tuple[ir.TensorBox, ...] = ()
    offs: ir.TensorBox | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: without scales there is nothing to round to."""
        return torch.float32 if self.scales else torch.int64

    @property
    def plan(self) -> Scheme:
        """The pairs of digits that are multiplied."""
        return Scheme(len(self.a_digits), len(self.b_digits), self.cut)

    @property
    def groups(self) -> sympy.Expr | None:
        """Number of groups."""
        return None if self.offs is None else self.offs.get_size()[0]

    @property
    def routed(self) -> bool:
        """Whether groups are of rows, each with a matrix of its own."""
        return self.offs is not None and len(self.b_digits[0].get_size()) == 3

    @property
    def size(self) -> list[sympy.Expr]:
        """Shape of the result."""
        lead = [] if self.groups is None or self.routed else [self.groups]
        return [*lead, *self.a_digits[0].get_size()[:-1], self.b_digits[0].get_size()[-1]]

    @property
    def k(self) -> sympy.Expr:
        """Terms of a sum."""
        return self.a_digits[0].get_size()[-1]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.a_digits[0].get_device_or_error()

    @property
    def hints(self) -> tuple[int, int]:
        """Typical M (of a group, where rows are routed) and N."""
        m, n = compat.size_hint(self.size[-2:], fallback=1024)
        (groups,) = compat.size_hint([self.groups], fallback=1) if self.routed else (1,)
        return -(-m // max(groups, 1)), n

    @property
    def empty(self) -> bool:
        """Whether nothing is added or nothing comes out."""
        return any(compat.is_true(sympy.Eq(size, 0)) for size in (*self.size, self.k))


def lower(
    a: ir.TensorBox,
    b: ir.TensorBox,
    a_digits: list[ir.TensorBox],
    b_digits: list[ir.TensorBox],
    a_scale: ir.TensorBox,
    b_scale: ir.TensorBox,
    cut: int,
) -> ir.TensorBox | None:
    """Lower `heal::digit_mm` on CUDA; None, its reference, where a GPU has no kernels.

    Args:
        a: `[(Q,) M, K]`.
        b: `[(Q,) K, N]`.
        a_digits: INT8 planes of `a`, the lowest first.
        b_digits: INT8 planes of `b`.
        a_scale: FP32 `[(Q,) M, 1]`; NaN where a row is not finite.
        b_scale: FP32 `[(Q,) 1, N]`.
        cut: Pairs of digits with i + j below this are dropped.

    Raises:
        DeviceCheckError: The template has failed its check on this GPU.
    """
    name = "exact_gemm_batched" if len(a.get_size()) == 3 else "exact_gemm"
    problem = DigitProblem(a_digits, b_digits, cut, (a, b), (a_scale, b_scale))
    return _lower(name, problem)


def lower_groups(
    a: ir.TensorBox,
    b: ir.TensorBox,
    offs: ir.TensorBox,
    a_digits: list[ir.TensorBox],
    b_digits: list[ir.TensorBox],
    a_scale: ir.TensorBox,
    b_scale: ir.TensorBox,
    cut: int,
) -> ir.TensorBox | None:
    """Lower `heal::digit_grouped_mm` on CUDA; None, its reference, where there is no kernel.

    There is none for routed rows if the number of groups is symbolic, or if there is one column.

    Args:
        a: `[T, K]` (rows are routed) or `[M, T]` (a ragged sum).
        b: `[G, K, N]` or `[T, N]`.
        offs: INT32 `[G]`, where each group ends.
        a_digits: INT8 planes of `a`, the lowest first.
        b_digits: INT8 planes of `b`.
        a_scale: FP32 `[T, 1]` or `[G, M, 1]`.
        b_scale: FP32 `[G, 1, N]`.
        cut: Pairs of digits with i + j below this are dropped.

    Raises:
        DeviceCheckError: The template has failed its check on this GPU.
    """
    problem = DigitProblem(a_digits, b_digits, cut, (a, b), (a_scale, b_scale), offs)
    # (A result of one element is stored without a mask: see `_by_descriptor`.)
    groups = offs.get_size()[0]
    if problem.routed and not (groups.is_number and compat.is_many(problem.size[-1])):
        return None
    return _lower("exact_grouped" if problem.routed else "exact_grouped_sum", problem)


def lower_sums(
    a_digits: list[ir.TensorBox], b_digits: list[ir.TensorBox], cut: int
) -> ir.TensorBox | None:
    """Lower `heal::digit_sums` on CUDA; None, its reference, where a GPU has no kernels.

    Args:
        a_digits: INT8 planes `[Q, M, K]`, the lowest first.
        b_digits: INT8 planes `[Q, K, N]`.
        cut: Pairs of digits with i + j below this are dropped.

    Raises:
        DeviceCheckError: The template has failed its check on this GPU.
    """
    return _lower("exact_sums", DigitProblem(a_digits, b_digits, cut))


def _lower(name: str, problem: DigitProblem) -> ir.TensorBox | None:
    if not has_kernels(problem.device):
        return None
    if problem.empty:
        return lowerings[aten.full.default](
            problem.size, 0, dtype=problem.dtype, device=problem.device
        )
    selfcheck.require(name, problem.device)
    cuts = bool(problem.operands) and problem.hints[0] <= FEW_ROWS
    nodes = _nodes(problem, cuts)
    layout = ir.FixedLayout(problem.device, problem.dtype, problem.size)
    tiles = exact_tiles(
        capability(problem.device),
        *problem.hints,
        problem.plan,
        cuts=cuts,
        groups=problem.offs is not None,
    )
    renderings = [tile.knobs | _knobs(problem, nodes, tile) for tile in tiles]
    return kernels.select(name, nodes, layout, renderings)


def _nodes(problem: DigitProblem, cuts: bool) -> list[ir.IRNode]:
    """What the kernel reads: operands, planes with K contiguous, scales, offsets."""
    contiguous, permute = ir.ExternKernel.require_contiguous, lowerings[aten.permute.default]
    turned = [0, 2, 1] if len(problem.b_digits[0].get_size()) == 3 else [1, 0]
    planes = list(problem.a_digits)
    if not cuts:
        planes += [permute(plane, turned) for plane in problem.b_digits]
    offs = [] if problem.offs is None else [compat.realize_inputs(problem.offs)]
    return [
        *map(compat.realize_inputs, problem.operands),
        *(compat.realize_inputs(contiguous(plane)) for plane in planes),
        *map(compat.realize_inputs, problem.scales),
        *offs,
    ]


def _knobs(problem: DigitProblem, nodes: list[ir.IRNode], tile: ExactTile) -> dict[str, Any]:
    plan, half = problem.plan, prefers_half(capability(problem.device))
    cuts = tile.swap
    span = terms(plan, half=half) // tile.block_k * tile.block_k
    known = compat.V.graph.sizevars.statically_known_true
    ragged = problem.offs is not None and not problem.routed
    even = not ragged and known(sympy.Eq(sympy.Mod(problem.k, tile.block_k), 0))
    return {
        "INTEGERS": not problem.scales,
        "ACC_TYPE": "tl.float32" if problem.scales else "tl.int64",
        "BATCHED": problem.offs is None and len(problem.size) == 3,
        "ROUTED": problem.routed,
        "RAGGED": ragged,
        "GROUPS": int(problem.groups or 0) if problem.routed else 0,
        "A_DIGITS": plan.left,
        "B_DIGITS": plan.right,
        "CUT": plan.cut,
        "SPAN": span,
        "LONG": not known(sympy.Le(problem.k, span)),
        "HALF": half,
        "B_CUT": cuts,
        "SWAP": cuts,
        "EVEN_K": even,
        "TMA": not cuts and not ragged and _by_descriptor(problem, nodes),
    }


def _by_descriptor(problem: DigitProblem, nodes: list[ir.IRNode]) -> bool:
    """Whether the chip has a copy engine that can fetch all planes.

    It reads zeros past the end, where the other way wraps around. So a result of one element,
    which Inductor stores without a mask, must not come this way.
    """
    start = len(problem.operands)
    planes = nodes[start : start + len(problem.a_digits) + len(problem.b_digits)]
    many = compat.is_many(problem.size[-1])
    fits = all(compat.fits_descriptor(plane) for plane in planes)
    return capability(problem.device) >= TMA_CAPABILITY and many and fits


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.heal.mm.default: digits_on_cuda,
    torch.ops.heal.bmm.default: digits_on_cuda,
    torch.ops.heal.grouped_mm.default: groups_on_cuda,
    torch.ops.heal.weighted_sum.default: weighted_on_cuda,
    torch.ops.heal.mm_partial.default: partial_on_cuda,
}
LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.heal.digit_mm.default: lower,
    torch.ops.heal.digit_grouped_mm.default: lower_groups,
    torch.ops.heal.digit_sums.default: lower_sums,
}
