"""CPU lowerings of attention's gradients: torch's FP32 flash kernel. May import `flash`.

Integers are dequantized for it. What the kernel cannot do (windows, caps, sinks, dropout, unequal
head sizes) is the operator's reference implementation, block by block.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from healpass.lowering.cpu.flash import fits_flash, float_mask, groups_of, repeat_heads
from healpass.lowering.expressions import aten, call, equals, fp32, view, where
from healpass.lowering.quantize import lower_dequantize
from healpass.ops.attention.scoring import Scoring


def lower_floats(grad: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
    """`heal::attention_backward` on CPU.

    Args:
        grad: FP32 `[B, H, L, Ev]`.
        query: FP16, BF16 or FP32 `[B, H, L, E]`.
        key: `[B, Hkv, S, E]`, any of those.
        value: `[B, Hkv, S, Ev]`, any of those.
        *rest: What `Scoring.read` takes, `numerics`, then output and logsumexp of the forward
            pass.
    """
    return _lower(grad, (query, key, value), *rest)


def lower_integers(grad: Any, *call: Any) -> Any:
    """`heal::integer_attention_backward` on CPU."""
    states = tuple(lower_dequantize(*call[i : i + 2]) for i in (0, 2, 4))
    return _lower(grad, states, *call[6:])


def _lower(grad: Any, states: tuple[Any, ...], *rest: Any) -> tuple[Any, Any, Any] | None:
    *arguments, _, output, logsumexp = rest
    scoring = Scoring.read(*arguments)
    if not fits_flash(scoring, *states):
        return None
    query, key, value = map(fp32, states)
    mask = None if scoring.attn_mask is None else float_mask(scoring.attn_mask, query, key)
    groups = groups_of(query, key)
    assert groups is not None, "fits_flash has looked"
    # A row that sees nothing has the logsumexp -inf, of which the kernel would make NaN.
    logsumexp = where(equals(logsumexp, -math.inf), 0.0, logsumexp)
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    of_query, *others = call(
        kernel,
        grad,
        query,
        *(repeat_heads(x, groups) for x in (key, value)),
        output,
        logsumexp,
        0.0,
        scoring.is_causal,
        attn_mask=mask,
        scale=scoring.scale,
    )
    of_key, of_value = (_join_heads(x, groups) for x in others)
    return of_query, of_key, of_value


def _join_heads(states: Any, groups: int) -> Any:
    """The sum over the query heads that share a key head."""
    if groups == 1:
        return states
    batch, heads, length, size = states.get_size()
    split = view(states, [batch, heads // groups, groups, length, size])
    return call(aten.sum.dim_IntList, split, [2], False)


LOWERINGS = {
    torch.ops.heal.attention_backward.default: lower_floats,
    torch.ops.heal.integer_attention_backward.default: lower_integers,
}
