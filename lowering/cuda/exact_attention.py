"""`heal::integer_attention` on CUDA where it is exact: two passes over the keys.

May import `attention` (launches), `compat`, `exact_matmul` (budgets), `exact_tiles`, `selfcheck`.
`DECOMPOSITIONS` makes `attention.exact_chunks` of it, of which `heal::exact_tops` and
`heal::exact_sums` become templates; what is between and behind them is plain Inductor code.
Chunks, tiles and spans are tuning: all that crosses them is exact. Its gradients become products
(`exact_matmul`) and bit-reproducible steps between them.
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
from healpass.ops.attention import exact_gradients
from healpass.ops.attention.exact import ExactAttention
from healpass.ops.attention.exact_chunks import attend_in_chunks, heads_per_key
from healpass.ops.attention.exact_chunks import read as read_how
from healpass.ops.attention.exact_steps import MOST_KEYS, P_DIGITS, scaled_scores
from healpass.ops.attention.integers import read
from healpass.ops.products.digits import digit_sums
from healpass.ops.products.exact import Scheme
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


def attend_on_cuda(*call: Any) -> Any:
    """Decompose `heal::integer_attention` where it is exact.

    NotImplemented leaves it to its lowering, or to its reference implementation: simulated adders,
    other devices, heads above 256, nothing to attend to, and what the reference refuses.

    Args:
        *call: The arguments of the operator.
    """
    asked = _exact(*call)
    if asked is None:
        return NotImplemented
    size = max(asked.query.shape[-1], asked.value.shape[-1])
    fits = asked.key.shape[2] <= 1 << MOST_KEYS[asked.value.planes]
    if size > LARGEST_HEAD or not fits or asked.is_empty:
        return NotImplemented
    rows = heads_per_key(asked.query.digits, asked.key.digits) * asked.query.shape[2]
    return attend_in_chunks(asked, DECODE_CHUNK if rows <= DECODE_ROWS else PREFILL_CHUNK)


def gradients_on_cuda(grad: Tensor, *call: Any) -> Any:
    """Decompose `heal::integer_attention_backward`: digit products, and what lies between them.

    The scores are formed again, and here they have a matrix in memory. NotImplemented as above.

    Args:
        grad: `[B, H, L, Ev]`.
        *call: The arguments of `heal::integer_attention`, and its results.
    """
    asked = _exact(*call[:-2])
    if asked is None or asked.is_empty:
        return NotImplemented
    query, key = asked.query, asked.key
    rows = [plane.reshape(*key.shape[:2], -1, key.shape[3]) for plane in query.digits.unbind(2)]
    sums = digit_sums(rows, [plane.mT for plane in key.digits.unbind(2)])
    sums = from_integers(sums.reshape(*query.shape[:3], key.shape[2]))
    scores = scaled_scores(sums, query.scale, key.scale, asked.scoring)

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        product: Tensor = heal.matmul(a, b, str(asked.how))
        return product

    scale = asked.scoring.scale
    return exact_gradients.attend_gradients(grad, asked.states, *scores, scale, multiply)


def _exact(*call: Any) -> ExactAttention | None:
    """The attention if it is exact, and a GPU has kernels for it."""
    asked = read(*call)
    if not isinstance(asked, ExactAttention) or not asked.is_plain:
        return None
    return asked if has_kernels(asked.query.device) else None


def lower_tops(
    query_digits: ir.TensorBox,
    query_scale: ir.TensorBox,
    key_digits: ir.TensorBox,
    key_scale: ir.TensorBox,
    value_scale: ir.TensorBox,
    *how: Any,
) -> tuple[ir.TensorBox, ir.TensorBox] | None:
    """Lower `heal::exact_tops` on CUDA; None, its reference, where a GPU has no kernels.

    Args:
        query_digits: INT8 `[B, H, D, L, E]`; H is a multiple of Hkv.
        query_scale: FP32 `[B, H, L]`.
        key_digits: INT8 `[B, Hkv, D, S, E]`.
        key_scale: FP32 `[B, Hkv, S]`.
        value_scale: FP32 `[B, Hkv, S]`.
        *how: As in `exact_chunks.read`.
    """
    query, key = States(query_digits, query_scale), States(key_digits, key_scale)
    problem, chunk = _problem((query, key, key), *how)
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


def lower_sums(*call: Any) -> tuple[ir.TensorBox, ir.TensorBox] | None:
    """Lower `heal::exact_sums` on CUDA; None, its reference, where a GPU has no kernels.

    Args:
        *call: The arguments of the operator: digits and scales of Q, K and V, and the rest.
    """
    states, (*how, top, factor, unit) = call[:6], call[6:]
    query, key, value = (States(*states[i : i + 2]) for i in (0, 2, 4))
    problem, chunk = _problem((query, key, value), *how)
    if not has_kernels(problem.device):
        return None
    name, size = "exact_attention_sums", _size(problem, chunk)
    selfcheck.require(name, problem.device)
    total = _buffer(problem, size, torch.int64)
    inputs = [node for x in (query, key, value) for node in x.nodes()]
    rows = [compat.realize_inputs(x) for x in (top, factor)]
    launch = Launch(
        name,
        [*inputs, *rows, *_mask(problem), total],
        _layout(problem, [*size, problem.output_size[-1]], torch.int64),
        mutated=[total],
        programs=[problem.key_heads, problem.rows, size[0]],
    )
    half = prefers_half(problem.capability)
    span = terms(Scheme(P_DIGITS, value.digits, 0), half=half) // BLOCK_N * BLOCK_N
    spans = {"SPAN": span, "LONG": chunk > span}
    knobs = _knobs(problem, chunk) | spans | {"UNIT": unit, "ACC_TYPE": "tl.int64", **EXP}
    return select(launch, knobs, _tiles(problem)), total


def _problem(states: tuple[States, States, States], *how: Any) -> tuple[AttentionProblem, int]:
    """The attention and its chunk; the kernels know no numerics but the exact one."""
    scoring, chunk = read_how(*how)
    return AttentionProblem.of_states(states, scoring, "exact5"), chunk


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
    heal.integer_attention.default: attend_on_cuda,
    heal.integer_attention_backward.default: gradients_on_cuda,
}
LOWERINGS: dict[Any, Callable[..., Any]] = {
    heal.exact_tops.default: lower_tops,
    heal.exact_sums.default: lower_sums,
}
