"""A fast simulated tensor core. Layer `tensorcore`: may import `arithmetic`.

An instruction (k16) is branch-free pointwise code over tiles of the accumulator (`tiles`) that
Inductor turns into one vector loop. Where the operands allow it the lanes are FP32 and INT32
(`narrow`), else FP64 (`wide`). Small problems run the same code eagerly. All of these give the
same bits as `reference`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from healpass.arithmetic.formats import FORMATS, FloatFormat
from healpass.tensorcore import narrow, wide
from healpass.tensorcore.rules import INSTRUCTION_K, RULES, AccumulationRule, Schedule
from healpass.tensorcore.tiles import TILE_N, Grid, Operand, padded

#: Below this many products the eager code is faster than waiting for a compiler.
COMPILE_FROM = 1 << 18
#: Accumulators of one pass: enough to hide the cost of a call, few enough for a core's cache.
PASS = 1 << 19
#: Elements of a right operand prepared at once: some 100 MB in FP64, half as much in FP32.
PREPARED = 1 << 23
#: Columns of one pass of the exact rule, which multiplies by FP64 matmuls.
_EXACT_COLUMNS = 512

_Pair = TypeVar("_Pair")
_Prepared = TypeVar("_Prepared")
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Arithmetic:
    """How instructions are computed: what kind of lanes, and the step over them.

    Attributes:
        step: One instruction on `(accumulator, a, b, sizes of a, of b)`.
        dtype: Of operands and accumulators.
        sizes: What the step asks about elements of a format; None is nothing.
    """

    step: Step
    dtype: torch.dtype
    sizes: Callable[[Tensor, FloatFormat], Tensor] | None


def simulate_matmul(
    a_pieces: Sequence[Tensor],
    b_pieces: Sequence[Tensor],
    rule: AccumulationRule | str,
    schedule: Schedule | None = None,
    *,
    compiled: bool | None = None,
) -> Tensor:
    """sum_i a_pieces[i] @ b_pieces[i], added as a kernel on the given hardware adds.

    Args:
        a_pieces: `[M, K]` tensors in one dtype (FP16 or BF16; FP32 for `sgemm` and `exact`), in
            the order of the chain: the lowest products first. Or `[B, M, K]`, one product each.
        b_pieces: `[K, N]` or `[B, K, N]` tensors of that dtype, one per tensor of `a_pieces`.
        rule: An accumulation rule or its name.
        schedule: In which order K is visited; None is what the rule asks for.
        compiled: Whether to compile; None decides by size. The result is the same.

    Returns:
        `[M, N]` or `[B, M, N]` in FP32.

    Raises:
        ValueError: Pieces do not pair up, or have dtypes that the rule does not multiply.
    """
    rule = RULES[rule] if isinstance(rule, str) else rule
    schedule = schedule or Schedule.of(rule)
    _check_pieces(a_pieces, b_pieces, rule)
    (*batch, m, k), n = a_pieces[0].shape, b_pieces[0].shape[-1]
    if 0 in (*batch, m, k, n):
        return a_pieces[0].new_zeros((*batch, m, n), dtype=torch.float32)
    if compiled is None:
        compiled = math.prod(batch) * m * n * k >= COMPILE_FROM
    with torch.no_grad():
        if rule.kind == "exact":
            return _each(a_pieces, b_pieces, lambda a, b: _exact(a, b, schedule))
        how = _arithmetic(a_pieces, b_pieces, rule, compiled)
        return _product(a_pieces, b_pieces, how, schedule)


def _check_pieces(a: Sequence[Tensor], b: Sequence[Tensor], rule: AccumulationRule) -> None:
    dtypes = {piece.dtype for piece in (*a, *b)}
    if len(a) != len(b) or not a:
        raise ValueError(
            f"{len(a)} left and {len(b)} right pieces: one right piece each is needed."
        )
    allowed = {torch.float16, torch.bfloat16}
    if rule.kind != "truncate":
        allowed.add(torch.float32)
    if len(dtypes) != 1 or not dtypes <= allowed:
        raise ValueError(
            f"the {rule.name} rule got pieces of {sorted(map(str, dtypes))}; it multiplies two "
            f"operands of one dtype among {sorted(map(str, allowed))}. Split or pack them first."
        )


def _arithmetic(
    a: Sequence[Tensor], b: Sequence[Tensor], rule: AccumulationRule, compiled: bool
) -> Arithmetic:
    """The fastest that is right for these operands."""
    if rule.kind == "fma":
        step = _fused_step() if compiled and a[0].device.type == "cpu" else None
        if step is not None:
            return Arithmetic(step, torch.float32, None)
        return Arithmetic(_step(wide.fused, None, compiled), torch.float64, None)
    if narrow.fits(a, b):
        step = _step(narrow.truncated, rule, compiled)
        return Arithmetic(step, torch.float32, narrow.exponents)
    return Arithmetic(_step(wide.truncated, rule, compiled), torch.float64, wide.powers)


def _step(step: Callable[..., Tensor], rule: AccumulationRule | None, compiled: bool) -> Step:
    if compiled:
        return _compiled(step, rule)
    return step if rule is None else functools.partial(step, rule=rule)


@functools.cache
def _compiled(step: Callable[..., Tensor], rule: AccumulationRule | None) -> Step:
    return torch.compile(_step(step, rule, False), dynamic=True)


@functools.cache
def _fused_step() -> Step | None:
    """Fused multiply-adds of the processor, where a compiled program turns out to use them."""
    step = narrow.fused_step()
    if step is None:
        return None
    with _disable_current_modes(), torch.no_grad():  # the question is about this machine alone
        compiled = _compiled(step, None)
        return compiled if narrow.is_fused(compiled) else None


# --------------------------------------------------------------------------------------- products


def _product(
    a: Sequence[Tensor], b: Sequence[Tensor], how: Arithmetic, schedule: Schedule
) -> Tensor:
    """Products in passes: over columns of one matrix, over matrices of a batch."""
    if a[0].dim() == 2:
        return _columns(a, b, how, schedule)
    (batch, m, k), n = a[0].shape, b[0].shape[-1]
    parts, count = [], max(_most_columns(m, k) // n, 1)
    for start in range(0, batch, count):
        some = slice(start, start + count)
        x, y = (_unique(pieces, lambda p: p[some]) for pieces in (a, b))  # noqa: B023
        if len(x[0]) == 1:
            parts.append(_each(x, y, lambda x, y: _columns(x, y, how, schedule)))
            continue
        grid = Grid(len(x[0]), m, n)
        left = _unique(x, lambda p: _operand(grid.left(p), how))  # noqa: B023
        right = _unique(y, lambda p: _operand(grid.right(p), how))  # noqa: B023
        parts.append(_pass(left, right, grid, how, schedule))
    return torch.cat(parts)


def _columns(
    a: Sequence[Tensor], b: Sequence[Tensor], how: Arithmetic, schedule: Schedule
) -> Tensor:
    (m, k), n = a[0].shape, b[0].shape[1]
    columns, width = [], 2 * TILE_N * max(_most_columns(m, k) // (2 * TILE_N), 2)
    left = _unique(a, lambda p: _operand(Grid(None, m, n).left(p), how))
    for start in range(0, n, width):
        grid = Grid(None, m, min(width, n - start))
        some = slice(start, start + width)
        right = _unique(b, lambda p: _operand(grid.right(p[:, some]), how))  # noqa: B023
        columns.append(_pass(left, right, grid, how, schedule))
    return torch.cat(columns, 1)


def _most_columns(m: int, k: int) -> int:
    return min(PASS // m, PREPARED // k)


def _pass(
    left: list[Operand], right: list[Operand], grid: Grid, how: Arithmetic, schedule: Schedule
) -> Tensor:
    zero = left[0].values[0].new_zeros(grid.shape)
    pairs = list(zip(left, right, strict=True))

    def instruction(accumulator: Tensor, pair: tuple[Operand, Operand], i: int) -> Tensor:
        a, b = pair
        return how.step(accumulator, a.values[i], b.values[i], a.sizes[i], b.sizes[i])

    k = len(left[0].values) * INSTRUCTION_K
    return grid.product(_added(schedule.splits(k), pairs, zero, instruction, torch.float32))


def _added(
    splits: list[list[list[list[range]]]],
    pairs: Sequence[_Pair],
    zero: Tensor,
    instruction: Callable[[Tensor, _Pair, int], Tensor],
    kept: torch.dtype,
) -> Tensor:
    """All instructions in a schedule's order, chains kept in the dtype that registers have."""

    def chain(dots: list[range]) -> Tensor:
        accumulator = zero
        for dot in dots:
            instructions = range(dot.start // INSTRUCTION_K, -(-dot.stop // INSTRUCTION_K))
            for pair in pairs:
                for i in instructions:
                    accumulator = instruction(accumulator, pair, i)
        return accumulator.to(kept)

    return _sum(
        _sum(_sum(chain(dots) for dots in chains) for chains in steps) for steps in splits
    ).to(torch.float32)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The terms added one after the other; no zero is added first, which would lose a -0."""
    return functools.reduce(torch.add, terms)


def _exact(a: Sequence[Tensor], b: Sequence[Tensor], schedule: Schedule) -> Tensor:
    """FP64 matmuls over an instruction's K, added in FP64, rounded once."""
    columns = [
        _exact_columns(a, _unique(b, lambda p: p[:, i : i + _EXACT_COLUMNS]), schedule)  # noqa: B023
        for i in range(0, b[0].shape[1], _EXACT_COLUMNS)
    ]
    return torch.cat(columns, 1)


def _exact_columns(a: Sequence[Tensor], b: Sequence[Tensor], schedule: Schedule) -> Tensor:
    (m, k), n = a[0].shape, b[0].shape[1]
    k = -(-k // INSTRUCTION_K) * INSTRUCTION_K

    def left(piece: Tensor) -> Tensor:
        wide = padded(piece.to(torch.float64), max(m, 2), k)
        return wide.unflatten(1, (-1, INSTRUCTION_K)).transpose(0, 1).contiguous()

    def right(piece: Tensor) -> Tensor:
        wide = padded(piece.to(torch.float64), k, max(n, 2)).contiguous()
        return wide.unflatten(0, (-1, INSTRUCTION_K))

    pairs = list(zip(_unique(a, left), _unique(b, right), strict=True))
    zero = pairs[0][0].new_zeros((max(m, 2), max(n, 2)))

    def instruction(accumulator: Tensor, pair: tuple[Tensor, Tensor], i: int) -> Tensor:
        return accumulator + pair[0][i] @ pair[1][i]

    return _added(schedule.splits(k), pairs, zero, instruction, torch.float64)[:m, :n]


# --------------------------------------------------------------------------------------- operands


def _operand(tiles: Tensor, how: Arithmetic) -> Operand:
    values = tiles.to(how.dtype)
    sizes = values if how.sizes is None else how.sizes(tiles, FORMATS[tiles.dtype])
    return Operand(values.unbind(), sizes.unbind())


def _each(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    multiply: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
) -> Tensor:
    """One matrix after the other."""
    if a[0].dim() == 2:
        return multiply(a, b)
    matrices = [
        multiply(_unique(a, lambda p: p[i]), _unique(b, lambda p: p[i]))  # noqa: B023
        for i in range(len(a[0]))
    ]
    return torch.stack(matrices)


def _unique(pieces: Sequence[Tensor], prepare: Callable[[Tensor], _Prepared]) -> list[_Prepared]:
    """Prepare each distinct tensor once: a weight meets both pieces of an activation."""
    done: dict[int, _Prepared] = {}
    for piece in pieces:
        if id(piece) not in done:
            done[id(piece)] = prepare(piece)
    return [done[id(piece)] for piece in pieces]
