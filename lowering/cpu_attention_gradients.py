"""CPU lowerings of attention's gradients: torch's FP32 flash kernel. May import `ops`.

Integers are dequantized for it. What the kernel cannot do (windows, caps, sinks, dropout, unequal
head sizes) is the operator's own meaning, block by block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from healpass.lowering.expressions import (
    aten,
    call,
    equals,
    fp32,
    is_static,
    same_size,
    unsqueeze,
    view,
    where,
)
from healpass.lowering.quantize import lower_dequantize

from healpass.ops.ieee import is_ieee
from healpass.ops.scores import Scoring


def lower_floats(grad: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
    """`heal::attention_backward` on CPU."""
    return _lower(grad, (query, key, value), *rest)


def lower_integers(grad: Any, *call: Any) -> Any:
    """`heal::integer_attention_backward` on CPU."""
    states = tuple(lower_dequantize(*call[i : i + 2]) for i in (0, 2, 4))
    return _lower(grad, states, *call[6:])


def _lower(grad: Any, states: tuple[Any, ...], *rest: Any) -> tuple[Any, Any, Any] | None:
    *arguments, _, output, logsumexp = rest
    scoring = Scoring.read(*arguments)
    if not _fits_flash(scoring, *states):
        return None
    query, key, value = map(fp32, states)
    mask = None if scoring.attn_mask is None else _float_mask(scoring.attn_mask, query, key)
    groups = _groups(query, key)
    assert groups is not None, "_fits_flash has looked"
    # A row that sees nothing has the logsumexp -inf, of which the kernel would make NaN.
    logsumexp = where(equals(logsumexp, -math.inf), 0.0, logsumexp)
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    of_query, *others = call(
        kernel,
        grad,
        query,
        *(_repeat_heads(x, groups) for x in (key, value)),
        output,
        logsumexp,
        0.0,
        scoring.is_causal,
        attn_mask=mask,
        scale=scoring.scale,
    )
    of_key, of_value = (_join_heads(x, groups) for x in others)
    return of_query, of_key, of_value


def _fits_flash(scoring: Scoring, query: Any, key: Any, value: Any) -> bool:
    """Whether torch's kernel can do it, in FP32.

    It takes a mask or causality, one head size for K and V, and at least one key and one query.
    """
    both = scoring.is_causal and scoring.attn_mask is not None
    if both or not scoring.is_plain or not is_ieee("cpu"):
        return False
    sizes = [size for operand in (query, key, value) for size in operand.get_size()]
    if any(is_static(size) and int(size) == 0 for size in sizes):
        return False
    same = same_size(query.get_size()[-1], value.get_size()[-1])
    return same and _groups(query, key) is not None


def _groups(query: Any, key: Any) -> int | None:
    """Query heads per key head; None if the numbers of heads are known only at run time."""
    heads, key_heads = query.get_size()[1], key.get_size()[1]
    if same_size(heads, key_heads):
        return 1
    return int(heads) // int(key_heads) if is_static(heads) and is_static(key_heads) else None


def _float_mask(attn_mask: Any, query: Any, key: Any) -> Any:
    """The mask as FP32 `[B or 1, H or 1, L, S]`, -inf where a key is hidden."""
    mask = attn_mask
    if mask.get_dtype() == torch.bool:
        mask = where(mask, 0.0, -math.inf)
    lead = list(mask.get_size())[:-2]
    lead = [1] * (2 - len(lead)) + lead
    return call(aten.expand.default, fp32(mask), [*lead, query.get_size()[2], key.get_size()[2]])


def _repeat_heads(states: Any, groups: int) -> Any:
    """Each head of `[B, Hkv, S, E]` once per query head."""
    if groups == 1:
        return states
    batch, heads, length, size = states.get_size()
    states = call(aten.expand.default, unsqueeze(states, 2), [batch, heads, groups, length, size])
    return view(states, [batch, heads * groups, length, size])


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
