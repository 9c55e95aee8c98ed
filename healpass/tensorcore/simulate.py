"""A fast simulated tensor core. Layer `tensorcore`: may import `arithmetic`.

Every lane is an FP64 number that holds an exact product or an FP32 value. The largest exponent of
a group is found as the largest *power of two* 2^(ea + eb), so alignment is one multiplication,
truncation one `trunc`, and the whole step is branch-free pointwise code over `[M, N]` that
Inductor turns into one vector loop per instruction (k16). Small problems run the same code
eagerly. The operations are exact but for the roundings that the rule asks for, so both give the
same bits as `reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from healpass.arithmetic.formats import FORMATS, FP32, FloatFormat
from healpass.arithmetic.promotion import TILE_K
from healpass.tensorcore.rules import INSTRUCTION_K, RULES, AccumulationRule, Schedule

#: Below this many products the eager code is faster than waiting for a compiler.
COMPILE_FROM = 1 << 18
#: Columns of one pass: operands and accumulators of a pass fit a core's cache.
COLUMNS = 512

_FP64_EXPONENT = 0x7FF << 52
_FP64_BELOW_FP32 = (1 << (53 - FP32.precision)) - 1

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Operand:
    """One piece in FP64 and the powers of two 2^exponent of its elements, by instruction."""

    values: Tensor
    powers: Tensor


def simulate_matmul(
    a_pieces: Sequence[Tensor],
    b_pieces: Sequence[Tensor],
    rule: AccumulationRule | str,
    *,
    tile_k: int = TILE_K,
    promote_every: int | Literal["rule"] | None = "rule",
    order: int = 0,
    split_k: int = 1,
    compiled: bool | None = None,
) -> Tensor:
    """sum_i a_pieces[i] @ b_pieces[i], added as a kernel on the given hardware adds.

    Args:
        a_pieces: `[M, K]` tensors in one dtype (FP16 or BF16; FP32 for `sgemm` and `exact`), in
            the
            order of the chain: the lowest products first.
        b_pieces: `[K, N]` tensors of that dtype, one per tensor of `a_pieces`.
        rule: An accumulation rule or its name.
        tile_k: K of a tile.
        promote_every: K of a chain; by default what the rule asks for, None is one over all of K.
        order: Seed of another order of the tiles.
        split_k: Parts of K that are summed apart.
        compiled: Whether to compile; None decides by size. The result is the same.

    Returns:
        `[M, N]` in FP32.

    Raises:
        ValueError: Pieces do not pair up, or have dtypes that the rule does not multiply.
    """
    rule = RULES[rule] if isinstance(rule, str) else rule
    every = rule.promote_every if promote_every == "rule" else promote_every
    schedule = Schedule(tile_k, every, order, split_k)
    _check_pieces(a_pieces, b_pieces, rule)
    (m, k), n = a_pieces[0].shape, b_pieces[0].shape[1]
    if 0 in (m, k, n):
        return a_pieces[0].new_zeros((m, n), dtype=torch.float32)
    if compiled is None:
        compiled = m * n * k >= COMPILE_FROM
    step = _compiled_step(rule) if compiled and rule.kind != "exact" else _step(rule)
    with torch.no_grad():
        left = _unique(a_pieces, _left)
        columns = []
        for start in range(0, n, COLUMNS):
            stop = min(start + COLUMNS, n)
            right = _unique(b_pieces, lambda b: _right(b[:, start:stop]))  # noqa: B023
            product = _columns(left, right, step, rule, schedule)
            columns.append(product[:m, : stop - start])
    return torch.cat(columns, 1)


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


def _columns(
    left: list[_Operand],
    right: list[_Operand],
    step: Step,
    rule: AccumulationRule,
    schedule: Schedule,
) -> Tensor:
    """All rows, some columns of the product; padding is still there."""
    k = left[0].values.shape[0] * INSTRUCTION_K
    kept = torch.float64 if rule.kind == "exact" else torch.float32
    splits = [
        _sum(_sum(_chain(left, right, dots, step).to(kept) for dots in chains) for chains in steps)
        for steps in schedule.splits(k)
    ]
    return _sum(splits).to(torch.float32)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The terms added one after the other; no zero is added first, which would lose a -0."""
    return functools.reduce(torch.add, terms)


def _chain(left: list[_Operand], right: list[_Operand], dots: list[range], step: Step) -> Tensor:
    """The accumulator after one chain, FP32 values in FP64."""
    rows, columns = left[0].values.shape[1], right[0].values.shape[2]
    accumulator = left[0].values.new_zeros((rows, columns))
    for dot in dots:
        instructions = range(dot.start // INSTRUCTION_K, -(-dot.stop // INSTRUCTION_K))
        for a, b in zip(left, right, strict=True):
            for i in instructions:
                accumulator = step(accumulator, a.values[i], b.values[i], a.powers[i], b.powers[i])
    return accumulator


# ---------------------------------------------------------------------------------------- operands


def _unique(pieces: Sequence[Tensor], prepare: Callable[[Tensor], _Operand]) -> list[_Operand]:
    """Prepare each distinct tensor once: a weight meets both pieces of an activation."""
    done: dict[int, _Operand] = {}
    for piece in pieces:
        if id(piece) not in done:
            done[id(piece)] = prepare(piece)
    return [done[id(piece)] for piece in pieces]


def _left(piece: Tensor) -> _Operand:
    """`[M, K]` to `[K / 16, M, 16]`."""
    values, powers = _widened(piece, 1)
    shape = (values.shape[0], -1, INSTRUCTION_K)
    return _Operand(
        values.reshape(shape).transpose(0, 1).contiguous(),
        powers.reshape(shape).transpose(0, 1).contiguous(),
    )


def _right(piece: Tensor) -> _Operand:
    """`[K, N]` to `[K / 16, 16, N]`."""
    values, powers = _widened(piece, 0)
    shape = (-1, INSTRUCTION_K, values.shape[1])
    return _Operand(values.reshape(shape), powers.reshape(shape))


def _widened(piece: Tensor, k_dim: int) -> tuple[Tensor, Tensor]:
    """FP64 values and powers, K padded to whole instructions by zeros, which add nothing.

    The other dimension is padded to 2: sizes 0 and 1 would each compile a program of their own.
    """
    shape = list(piece.shape)
    shape[k_dim] = -(-shape[k_dim] // INSTRUCTION_K) * INSTRUCTION_K
    shape[1 - k_dim] = max(shape[1 - k_dim], 2)
    values = piece.new_zeros(shape, dtype=torch.float64)
    values[: piece.shape[0], : piece.shape[1]] = piece
    return values, _powers(values, FORMATS[piece.dtype])


def _powers(values: Tensor, fmt: FloatFormat) -> Tensor:
    """2^exponent of each element as its format stores it; 0 for zeros, any for non-finite ones."""
    power = _leading_bit(values).clamp_(fmt.smallest_normal, 2.0**fmt.max_exponent)
    return torch.where(values == 0, 0.0, power)


def _leading_bit(x: Tensor) -> Tensor:
    """2^floor(log2|x|) for normal FP64 `x`, by clearing the other bits."""
    return (x.view(torch.int64) & _FP64_EXPONENT).view(torch.float64)


# ------------------------------------------------------------------------------------------- steps


@functools.cache
def _compiled_step(rule: AccumulationRule) -> Step:
    return torch.compile(_step(rule), dynamic=True)


def _step(rule: AccumulationRule) -> Step:
    """One instruction on `(accumulator [M, N], a [M, 16], b [16, N], powers of a, of b)`."""
    if rule.kind == "exact":
        return lambda accumulator, a, b, _pa, _pb: accumulator + a @ b
    if rule.kind == "fma":
        return _fma_step

    def step(c: Tensor, a: Tensor, b: Tensor, pa: Tensor, pb: Tensor) -> Tensor:
        for start in range(0, INSTRUCTION_K, rule.group):
            lanes = range(start, start + rule.group)
            c = _truncated_group(c, a, b, pa, pb, lanes, rule.fraction_bits)
        return c

    return step


def _truncated_group(
    c: Tensor, a: Tensor, b: Tensor, pa: Tensor, pb: Tensor, lanes: range, fraction_bits: int
) -> Tensor:
    """Align the products of some lanes and the accumulator, truncate, add, round toward zero."""
    top = _leading_bit(c).clamp(FP32.smallest_normal, 2.0**FP32.max_exponent)
    for i in lanes:
        top = torch.maximum(top, pa[:, i, None] * pb[i])
    scale = 2.0**fraction_bits / top
    total = torch.trunc(c * scale)
    for i in lanes:
        total = total + torch.trunc((a[:, i, None] * b[i]) * scale)
    return _toward_zero(total * (top * 2.0**-fraction_bits))


def _toward_zero(x: Tensor) -> Tensor:
    """FP64 `x` rounded toward zero to FP32, kept in FP64; past the largest number is infinity."""
    normal = (x.view(torch.int64) & ~_FP64_BELOW_FP32).view(torch.float64)
    step = FP32.smallest_subnormal
    subnormal = torch.trunc(x * (1.0 / step)) * step
    result = torch.where(x.abs() < FP32.smallest_normal, subnormal, normal)
    return torch.where(x.abs() >= 2.0 ** (FP32.max_exponent + 1), x * torch.inf, result)


def _fma_step(c: Tensor, a: Tensor, b: Tensor, _pa: Tensor, _pb: Tensor) -> Tensor:
    for i in range(INSTRUCTION_K):
        c = _fma(c, a[:, i, None] * b[i])
    return c


def _fma(c: Tensor, product: Tensor) -> Tensor:
    """C + product rounded once to FP32: FP64 addition rounded to odd, then to nearest.

    Rounding to odd in 53 bits before rounding to 24 is innocuous (Boldo and Melquiond 2008); the
    error that says which way to go is Knuth's TwoSum.
    """
    total = c + product
    back = total - c
    error = (c - (total - back)) + (product - back)
    inexact = (error > 0) | (error < 0)
    away = inexact & ((error > 0) != (total > 0))
    bits = total.view(torch.int64) - away.to(torch.int64)
    odd = (bits | inexact.to(torch.int64)).view(torch.float64)
    return torch.where(total.isfinite(), odd, total).to(torch.float32).to(torch.float64)
