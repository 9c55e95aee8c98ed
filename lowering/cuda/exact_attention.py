"""`heal::exact_attend` and `heal::exact_attention` on CUDA: two passes over the keys.

May import `attention` (launches), `compat`, `exact_matmul` (budgets), `exact_tiles`, `selfcheck`.
`DECOMPOSITIONS` opens the operators into digits and `attention.exact_chunks`, of which
`heal::exact_tops` and `heal::exact_sums` become templates; what is between and behind them is
plain Inductor code. Chunks, tiles and spans are tuning: all that crosses them is exact.
`heal::exact_attend_backward` becomes products (`exact_matmul`) and bit-reproducible steps between
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import empty_strided

from healpass.arithmetic.int16 import round_trip
from healpass.errors import OperandError
from healpass.lowering import compat
from healpass.lowering.cuda import selfcheck
from healpass.lowering.cuda.attention import (
    DECODE_ROWS,
    LARGEST_HEAD,
    AttentionProblem,
    Launch,
    select,
)
from healpass.lowering.cuda.exact_matmul import capability, has_kernels, terms
from healpass.lowering.cuda.exact_tiles import exact_attention_tiles, prefers_half
from healpass.lowering.states import States
from healpass.ops.attention.exact import (
    FORMATS,
    MOST_KEYS,
    P_DIGITS,
    Planes,
    planes,
    scaled_scores,
)
from healpass.ops.attention.exact_chunks import attention_in_parts, heads_per_key
from healpass.ops.attention.exact_sdpa import attend_gradients
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.digits import digit_sums
from healpass.ops.products.exact import Scheme
from healpass.ops.products.numerics import Numerics
from healpass.ops.reproducible import fp64, fp64_coefficients
from healpass.ops.reproducible.reduce import from_integers

#: Tuning: keys per program where few rows, or many, share a key head; multiples of BLOCK_N.
DECODE_CHUNK, PREFILL_CHUNK = 256, 1 << 15
#: Tuning: keys per block.
BLOCK_N = 32
#: The constants of `reproducible.fp64.exp`, for the kernel that repeats it step by step.
EXP = {
    "EXPM1": fp64_coefficients.EXPM1,
    "INVERSE_LN2": 1 / math.log(2),
    "LN2_HIGH": fp64.LN2_HIGH,
    "LN2_LOW": fp64.LN2_LOW,
}

heal = torch.ops.heal


def attend_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    kv: str,
    numerics: str,
) -> Tensor:
    """Decompose `heal::exact_attend`: the digits are made by what makes Q, K and V.

    Args:
        query: `[B, H, L, E]` in FP16, BF16 or FP32; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`, any of those.
        value: `[B, Hkv, S, Ev]`, any of those.
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        is_causal: Hide key s from query l where s > l.
        scale: Factor of the scores.
        kv: `int16` or `int24`: what Q, K and V are rounded to.
        numerics: As the operator takes it.
    """
    if not has_kernels(query.device):
        return NotImplemented
    digits = [part for x in (query, key, value) for part in planes(x, kv)]
    return heal.exact_attention(*digits, attn_mask, is_causal, scale, numerics)


def attention_on_cuda(
    query_digits: Tensor,
    query_scale: Tensor,
    key_digits: Tensor,
    key_scale: Tensor,
    value_digits: Tensor,
    value_scale: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    numerics: str,
) -> Tensor:
    """Decompose `heal::exact_attention`; NotImplemented leaves it to its reference implementation.

    Left are simulated adders, other devices, heads above 256, nothing to attend to, and what the
    reference implementation refuses.

    Args:
        query_digits: INT8 `[B, H, D, L, E]`; H is a multiple of Hkv.
        query_scale: FP32 `[B, H, L]`.
        key_digits: INT8 `[B, Hkv, D, S, E]`.
        key_scale: FP32 `[B, Hkv, S]`.
        value_digits: INT8 `[B, Hkv, D, S, Ev]`.
        value_scale: FP32 `[B, Hkv, S]`.
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        is_causal: Hide key s from query l where s > l.
        scale: Factor of the scores.
        numerics: An exact precision.
    """
    how, keys = Numerics.parse(numerics), key_digits.shape[3]
    if how.simulate or how.order or not has_kernels(query_digits.device):
        return NotImplemented
    fits = max(query_digits.shape[-1], value_digits.shape[-1]) <= LARGEST_HEAD
    fits = fits and keys <= 1 << MOST_KEYS[value_digits.shape[2]]
    if not fits or 0 in (*query_digits.shape, *value_digits.shape):
        return NotImplemented
    few = heads_per_key(query_digits, key_digits) * query_digits.shape[3] <= DECODE_ROWS
    chunk = DECODE_CHUNK if few else PREFILL_CHUNK
    query, key = Planes(query_digits, query_scale), Planes(key_digits, key_scale)
    scoring = Scoring(scale, attn_mask, is_causal=is_causal)
    return attention_in_parts(query, key, Planes(value_digits, value_scale), scoring, chunk)


def gradients_on_cuda(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    kv: str,
    numerics: str,
) -> Any:
    """Decompose `heal::exact_attend_backward`: digit products, and what lies between them.

    The scores are formed again, and here they have a matrix in memory. NotImplemented as above.

    Args:
        grad: `[B, H, L, Ev]`.
        query: `[B, H, L, E]` in FP16, BF16 or FP32; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`, any of those.
        value: `[B, Hkv, S, Ev]`, any of those.
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        is_causal: Hide key s from query l where s > l.
        scale: Factor of the scores.
        kv: `int16` or `int24`: what Q, K and V are rounded to.
        numerics: As the operator takes it.
    """
    how = Numerics.parse(numerics)
    if how.simulate or how.order or not has_kernels(query.device):
        return NotImplemented
    if 0 in (*query.shape, *key.shape, *value.shape):
        return NotImplemented
    (q, q_scale), (k, k_scale) = planes(query, kv), planes(key, kv)
    rows = [plane.reshape(*key.shape[:2], -1, key.shape[3]) for plane in q.unbind(2)]
    sums = digit_sums(rows, [plane.mT for plane in k.unbind(2)])
    sums = sums.reshape(*query.shape[:3], key.shape[2])
    scoring = Scoring(scale, attn_mask, is_causal=is_causal)
    scores, visible = scaled_scores(from_integers(sums), q_scale, k_scale, scoring)
    states = tuple(round_trip(x, FORMATS[kv]) for x in (query, key, value))

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        product: Tensor = heal.matmul(a, b, numerics)
        return product

    return attend_gradients(grad, states, scores, visible, scale, multiply)


def lower_tops(
    query_digits: ir.TensorBox,
    query_scale: ir.TensorBox,
    key_digits: ir.TensorBox,
    key_scale: ir.TensorBox,
    value_scale: ir.TensorBox,
    mask: ir.TensorBox | None,
    is_causal: bool,
    scale: float,
    chunk: int,
) -> tuple[ir.TensorBox, ir.TensorBox] | None:
    """Lower `heal::exact_tops` on CUDA; None, its reference, where a GPU has no kernels.

    Args:
        query_digits: INT8 `[B, H, D, L, E]`; H is a multiple of Hkv.
        query_scale: FP32 `[B, H, L]`.
        key_digits: INT8 `[B, Hkv, D, S, E]`.
        key_scale: FP32 `[B, Hkv, S]`.
        value_scale: FP32 `[B, Hkv, S]`.
        mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        is_causal: Hide key s from query l where s > l.
        scale: Factor of the scores.
        chunk: Keys per chunk.
    """
    query, key = States(query_digits, query_scale), States(key_digits, key_scale)
    scoring: Any = Scoring(scale, mask, is_causal=is_causal)  # type: ignore[arg-type]
    problem = AttentionProblem(query, key, key, scoring, "exact5")
    if not has_kernels(problem.device):
        return None
    name, size = "exact_attention_tops", _size(problem, chunk)
    selfcheck.require(name, problem.device)
    largest = _buffer(problem, size, torch.float32)
    states = [*query.nodes(), *key.nodes(), compat.realize_inputs(value_scale)]
    launch = Launch(
        name,
        [*states, *_mask(problem), largest],
        _layout(problem, size, torch.float64),
        mutated=[largest],
        programs=[problem.key_heads, problem.rows, size[0]],
    )
    knobs = _knobs(problem, chunk) | {"ACC_TYPE": "tl.float64"}
    return select(launch, knobs, _tiles(problem)), largest


def lower_sums(
    query_digits: ir.TensorBox,
    query_scale: ir.TensorBox,
    key_digits: ir.TensorBox,
    key_scale: ir.TensorBox,
    value_digits: ir.TensorBox,
    value_scale: ir.TensorBox,
    mask: ir.TensorBox | None,
    is_causal: bool,
    scale: float,
    chunk: int,
    top: ir.TensorBox,
    factor: ir.TensorBox,
    unit: float,
) -> tuple[ir.TensorBox, ir.TensorBox] | None:
    """Lower `heal::exact_sums` on CUDA; None, its reference, where a GPU has no kernels.

    Args:
        query_digits: INT8 `[B, H, D, L, E]`; H is a multiple of Hkv.
        query_scale: FP32 `[B, H, L]`.
        key_digits: INT8 `[B, Hkv, D, S, E]`.
        key_scale: FP32 `[B, Hkv, S]`.
        value_digits: INT8 `[B, Hkv, D, S, Ev]`.
        value_scale: FP32 `[B, Hkv, S]`.
        mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        is_causal: Hide key s from query l where s > l.
        scale: Factor of the scores.
        chunk: Keys per chunk.
        top: FP64 `[B, H, L]`, the largest score of the row.
        factor: FP64 `[B, H, L]`, what p times V's scale is multiplied by before it is rounded.
        unit: What p is multiplied by before it is rounded.
    """
    query, key = States(query_digits, query_scale), States(key_digits, key_scale)
    value = States(value_digits, value_scale)
    scoring: Any = Scoring(scale, mask, is_causal=is_causal)  # type: ignore[arg-type]
    problem = AttentionProblem(query, key, value, scoring, "exact5")
    if not has_kernels(problem.device):
        return None
    name, size = "exact_attention_sums", _size(problem, chunk)
    selfcheck.require(name, problem.device)
    total = _buffer(problem, size, torch.int64)
    states = [node for x in (query, key, value) for node in x.nodes()]
    rows = [compat.realize_inputs(x) for x in (top, factor)]
    launch = Launch(
        name,
        [*states, *rows, *_mask(problem), total],
        _layout(problem, [*size, problem.output_size[-1]], torch.int64),
        mutated=[total],
        programs=[problem.key_heads, problem.rows, size[0]],
    )
    half = prefers_half(problem.capability)
    span = terms(Scheme(P_DIGITS, value.digits, 0), half=half) // BLOCK_N * BLOCK_N
    spans = {"SPAN": span, "LONG": chunk > span}
    knobs = _knobs(problem, chunk) | spans | {"UNIT": unit, "ACC_TYPE": "tl.int64", **EXP}
    return select(launch, knobs, _tiles(problem)), total


def _size(problem: AttentionProblem, chunk: int) -> list[Any]:
    """`[C, B, H, L]`."""
    return [compat.ceildiv(problem.key.size[2], chunk), *problem.query.size[:3]]


def _buffer(problem: AttentionProblem, size: list[Any], dtype: torch.dtype) -> ir.TensorBox:
    """Memory that a kernel writes beside its output."""
    return empty_strided(size, None, dtype=dtype, device=problem.device)


def _layout(problem: AttentionProblem, size: list[Any], dtype: torch.dtype) -> ir.FixedLayout:
    return ir.FixedLayout(problem.device, dtype, [sympy.sympify(s) for s in size])


def _mask(problem: AttentionProblem) -> list[ir.IRNode]:
    mask = problem.expanded_mask()
    return [] if mask is None else [mask]


def _tiles(problem: AttentionProblem) -> list[Any]:
    return exact_attention_tiles(
        problem.capability,
        max(problem.head_blocks),
        problem.key.digits,
        decodes=problem.decodes,
    )


def _knobs(problem: AttentionProblem, chunk: int) -> dict[str, Any]:
    """The knobs of both kernels.

    With them goes ACC_TYPE, the dtype that Inductor takes the output for when it fuses what
    follows. (Seen: without it an FP64 output is rounded to FP32.)

    Raises:
        OperandError: A level of scores may leave its accumulator; heads are too small for that.
    """
    half, keys = prefers_half(capability(problem.device)), problem.key
    knobs = problem.knobs() | {"BLOCK_N": BLOCK_N, "CHUNK": chunk, "HALF": half}
    held = terms(Scheme(problem.query.digits, keys.digits, 0), half=half)
    if int(keys.size[-1]) > held:
        raise OperandError(
            f"exact attention over heads of {keys.size[-1]} elements: a level of digit products "
            f"holds {held}.\nUse heads of at most {held} elements, or the CPU."
        )
    return knobs


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    heal.exact_attend.default: attend_on_cuda,
    heal.exact_attention.default: attention_on_cuda,
    heal.exact_attend_backward.default: gradients_on_cuda,
}
LOWERINGS: dict[Any, Callable[..., Any]] = {
    heal.exact_tops.default: lower_tops,
    heal.exact_sums.default: lower_sums,
}
