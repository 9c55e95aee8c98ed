"""`precision="exact"` compiled for CPU: the bits of the operators' reference. May import `ops`.

The operators' reference implementation makes digits by eager torch operators, one pass over memory
each. Here the same integers are written as functions that Inductor traces, so that scales and
digits are made in registers beside what reads them, and the sums are taken by whatever adds
integers fastest:

* one row: FP64 multiply-adds in one loop over the weight, which is read in its 16 bits;
* more rows: INT8 products (oneDNN, where it passes the self-test of `products.exact`), the
  digits of the activation stacked, one call per digit of the weight;
* attention: one FP64 product each for Q K^T and P V.

FP64 adds integers below 2^53 exactly, in any order. In units of 256^cut a total is at most
2^38 (1 + 2^-7) per term (`products.exact`), so K up to 2^14 stays below 2^53; Q K^T is at most
limit^2 E, and P V 2^22 limit S. What does not fit a budget keeps its reference implementation
(`NotImplemented`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.digits import BASE_BITS, DIGIT_MAX, scaled_digits
from healpass.arithmetic.int16 import IntegerFormat
from healpass.lowering.cpu import gemm
from healpass.ops.attention.exact import ExactAttention
from healpass.ops.attention.exact_steps import P_BITS, attend_scores, scaled_scores
from healpass.ops.attention.integers import read
from healpass.ops.attention.quantize import integers
from healpass.ops.attention.scoring import Scoring, part
from healpass.ops.products.exact import Scheme, fastest_route, scale_of, scheme
from healpass.ops.products.numerics import Numerics
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import from_integers

heal = torch.ops.heal

FP64_BITS = 53
#: Tuning: rows of a block of causal attention at least, and blocks at most (each is compiled).
FEWEST_ROWS, MOST_BLOCKS = 64, 4
#: Terms of a matrix product whose total, in units of 256^cut, stays below 2^53.
MOST_TERMS = 1 << 14


def mm(a: Tensor, b: Tensor, numerics: str = "heal") -> Any:
    """`heal::mm` for an exact precision; NotImplemented where the reference has to run.

    Args:
        a: `[M, K]` in FP16, BF16 or FP32.
        b: `[K, N]`, any of those.
        numerics: As `heal::mm` takes it.
    """
    how = Numerics.parse(numerics)
    if how.products is None or not _is_plain(how, a) or _has_a_kernel(b) or not _fits(a, b):
        return NotImplemented
    plan, weight = (
        scheme(how.products, b.dtype),
        b.mT,
    )  # [N, K], as a linear layer's lies in memory
    row_scale, column_scale = scale_of(a, -1, plan.left), scale_of(weight, -1, plan.right)
    add = _row_sums if a.shape[0] == 1 else _int8_sums
    total = add(a, weight, row_scale, column_scale, plan)
    unit = row_scale.to(torch.float64) * column_scale.mT.to(torch.float64)
    result = fp64.to_fp32(total * (unit * 2.0 ** (BASE_BITS * plan.cut)))
    return heal.with_special(result, a, b, row_scale, column_scale)


def _has_a_kernel(b: Tensor) -> bool:
    """Whether `cpu.gemm` multiplies by it: the operator stays one, and is lowered."""
    return gemm.has_vnni() and b.stride(0) == 1 and gemm.takes_exactly(*b.shape)


def _is_plain(how: Numerics, x: Tensor) -> bool:
    return how.plain and x.device.type == "cpu"


def _fits(a: Tensor, b: Tensor) -> bool:
    """Whether sizes are known where a proof needs them, and INT8 products are right here."""
    rows, terms, columns = a.shape[0], a.shape[1], b.shape[1]
    known = isinstance(terms, int) and isinstance(columns, int)
    if not known or not 0 < terms <= MOST_TERMS or 0 in (rows, columns):
        return False
    # A size of 1 would meet the fault of torch's INT8 product (`products.exact.int8_mm`).
    return rows == 1 or (min(terms, columns) > 1 and fastest_route("cpu") == "int8")


def _row_sums(a: Tensor, weight: Tensor, a_scale: Tensor, scale: Tensor, plan: Scheme) -> Tensor:
    """One row by `[N, K]` in units of 256^cut: the weight is read once, and split in registers.

    The kept pairs are, with c = cut, (the digits of x from c on) w, and for each digit i below,
    x_i (the digits of w from c - i on).
    """
    x, w = _integers(a, a_scale), _integers(weight, scale)
    products = _stored(_above(x, plan.cut)) * w.to(torch.float64)
    for i in range(plan.cut):
        digit = _above(x, i) - _above(x, i + 1) * 2.0**BASE_BITS
        products = products + _stored(digit) * _above(w, plan.cut - i).to(torch.float64)
    return products.sum(-1).unsqueeze(0)


def _stored(row: Tensor) -> Tensor:
    """`row` in FP64, in memory: else what makes it would run again for every row of the weight.

    Inductor computes the operand of `as_strided` once; here it changes nothing.
    """
    wide = row.to(torch.float64)
    return wide.as_strided(wide.shape, wide.stride())


def _integers(x: Tensor, scale: Tensor) -> Tensor:
    """`x` in units of `scale` (a power of two), rounded to integers of up to 24 bits, in FP32."""
    return (x.to(torch.float32) * (1.0 / scale)).round()


def _above(integers: Tensor, count: int) -> Tensor:
    """`integers` (floats) without their lowest `count` balanced digits, in units of 256^count."""
    for _ in range(count):
        integers = torch.floor((integers + DIGIT_MAX) * 2.0**-BASE_BITS)
    return integers


def _int8_sums(a: Tensor, weight: Tensor, a_scale: Tensor, scale: Tensor, plan: Scheme) -> Tensor:
    """`[M, K]` by `[N, K]` in units of 256^cut, FP64.

    One INT8 product per digit of the weight, for all digits of `a` that it meets, stacked.
    """
    left = scaled_digits(a, a_scale, plan.left)
    right = scaled_digits(weight, scale, plan.right)
    rows, total = a.shape[0], None
    for j, digit in enumerate(right):
        lowest = max(plan.cut - j, 0)
        if lowest >= plan.left:
            continue
        sums = torch._int_mm(torch.cat(left[lowest:]), digit.mT)
        for i in range(lowest, plan.left):
            part = sums.narrow(0, (i - lowest) * rows, rows).to(torch.float64)
            part = part * 2.0 ** (BASE_BITS * (i + j - plan.cut))
            total = part if total is None else total + part
    assert total is not None, "a scheme keeps a pair"
    return total


# ------------------------------------------------------------------------------------- attention


def attend(*call: Any) -> Any:
    """`heal::integer_attention`, exact; NotImplemented where its lowering or reference has to run.

    Args:
        *call: The arguments of the operator.
    """
    asked = read(*call)
    if not isinstance(asked, ExactAttention) or not _takes(asked):
        return NotImplemented
    (q, q_scale), (k, k_scale), (v, v_scale) = (
        (integers(state.digits), state.scale) for state in (asked.query, asked.key, asked.value)
    )
    blocks, weighted = [], partial(_weighted, fmt=asked.value.format)
    for rows, columns in visible_blocks(q.shape[2], k.shape[2], asked.scoring):
        scores, visible = scaled_scores(
            _products(part(q, 2, rows), part(k, 2, columns)),
            part(q_scale, 2, rows),
            part(k_scale, 2, columns),
            asked.scoring,
            rows,
            columns,
        )
        weigh = partial(weighted, value=part(v, 2, columns))
        blocks.append(attend_scores(scores, visible, part(v_scale, 2, columns), weigh))
    if len(blocks) == 1:
        return blocks[0]
    outputs, logsumexps = zip(*blocks, strict=True)
    return torch.cat(outputs, 2), torch.cat(logsumexps, 2)


def visible_blocks(length: Any, keys: Any, scoring: Scoring) -> list[tuple[slice, slice]]:
    """Blocks of rows, and the keys that they may see: half of the work where a mask is causal.

    A row's bits depend on what it sees alone (`attention.exact_steps`).

    Args:
        length: Queries.
        keys: Keys, at least one.
        scoring: Its causality and window decide.
    """
    sizes = (length, keys, scoring.window or 0)
    limited = scoring.is_causal or scoring.window is not None
    if not limited or not all(isinstance(size, int) for size in sizes):
        return [(slice(0, length), slice(0, keys))]
    count = max(FEWEST_ROWS, -(-length // MOST_BLOCKS))
    spans = [slice(start, min(start + count, length)) for start in range(0, length, count)]
    seen = [scoring.columns(rows, keys) for rows in spans]  # none: one key, which is hidden
    return [
        (rows, slice(min(columns.start, columns.stop - 1), columns.stop))
        for rows, columns in zip(spans, seen, strict=True)
    ]


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Q K^T of integers, `[B, H, L, E]` by `[B, Hkv, S, E]`, in FP64."""
    return torch.matmul(_grouped(q, k), k.mT).reshape(*q.shape[:-1], k.shape[2])


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """`[B, H, L, N]` as `[B, Hkv, R, N]`: the rows that share a key head, one after another."""
    batch, heads, length, size = x.shape
    return x.reshape(batch, key.shape[1], heads // key.shape[1] * length, size)


def _takes(asked: ExactAttention) -> bool:
    """Whether it is real, on CPU, and within the budgets of FP64."""
    if not asked.is_plain or asked.query.device.type != "cpu" or asked.is_empty:
        return False
    room, keys = 1 << FP64_BITS, asked.key.shape[2]
    q, k, v = (state.format for state in (asked.query, asked.key, asked.value))
    terms = asked.query.shape[-1] * q.limit * k.limit <= room
    return bool(terms and keys * (_largest_part(v) << P_BITS) <= room)


def _largest_part(fmt: IntegerFormat) -> int:
    """Of what V is multiplied by at once: two digits of it."""
    return int(min(fmt.limit, 1 << 15))


def _weighted(fixed: Tensor, value: Tensor, fmt: IntegerFormat) -> Tensor:
    """P V exactly, rounded once to FP64: `[B, H, L, S]` by `[B, Hkv, S, E]` integers."""
    weights = _grouped(fixed.to(torch.float64), value)
    size = (*fixed.shape[:-1], value.shape[-1])
    if fmt.limit < 1 << 15:
        return torch.matmul(weights, value).reshape(size)
    high = _above(value, 1)
    parts = [torch.matmul(weights, part) for part in (value - high * 2.0**BASE_BITS, high)]
    low, top = (part.to(torch.int64) for part in parts)
    return from_integers(low + (top << BASE_BITS)).reshape(size)


#: Operator -> a traceable function with its bits, or NotImplemented.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    heal.mm.default: mm,
    heal.integer_attention.default: attend,
}
