"""CPU lowerings of attention, in FP32 and on integers: no score matrix in memory.

Prefill goes through torch's FP32 flash kernel, integers dequantized for it. Decode on integers is
written as sums, which Inductor turns into loops that read the cache's digits and upcast them in
registers: no FP32 copy of the cache exists. Where neither serves (windows, caps, sinks, dropout
with many queries, unequal head sizes) a lowering returns None and the operator's own meaning runs,
block by block. May import `ops`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from healpass.lowering.cpu import DECODE_ROWS
from healpass.lowering.expressions import (
    add,
    amax,
    aten,
    call,
    clamp,
    div,
    equals,
    fp32,
    fp64,
    is_static,
    mul,
    same_size,
    stored,
    sub,
    total,
    unsqueeze,
    view,
    where,
)
from healpass.lowering.quantize import integers, lower_dequantize

from healpass.arithmetic.formats import FP32
from healpass.ops.ieee import is_ieee


def lower_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    is_causal: bool,
    scale: float,
    numerics: str = "heal",
) -> Any:
    """`heal::attention` on CPU: torch's FP32 flash attention."""
    del numerics
    both = is_causal and attn_mask is not None  # the operator takes both, torch's kernel does not
    if both or not is_ieee("cpu") or not _fits_flash(query, key, value):
        return None
    query, key, value = map(fp32, (query, key, value))
    return _attend_flash(query, key, value, attn_mask, is_causal, scale)[0]


def lower_integer_attention(
    query_digits: Any,
    query_scale: Any,
    key_digits: Any,
    key_scale: Any,
    value_digits: Any,
    value_scale: Any,
    attn_mask: Any,
    sinks: Any,
    seed: Any,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout_p: float,
    numerics: str,
) -> Any:
    """`heal::integer_attention` on CPU: sums over digits for few queries, flash for many.

    Both are FP32 arithmetic on the integers' values; `arithmetic.attention_bounds` bounds it. As
    any FP32 attention, the flash kernel gives NaN for scores past FP32's range and lets a hidden
    key that is NaN through; the sums do neither.
    """
    del seed, numerics
    key, value = (key_digits, key_scale), (value_digits, value_scale)
    few = is_static(query_scale.get_size()[-1]) and int(query_scale.get_size()[-1]) <= DECODE_ROWS
    visible = not is_causal and window is None and not _is_empty(query_scale, key_scale)
    visible = visible and _groups(query_scale, key_scale) is not None
    if few and visible and dropout_p == 0.0:
        return _attend_few(
            (query_digits, query_scale), key, value, attn_mask, sinks, scale, softcap
        )
    plain = window is None and softcap is None and sinks is None and dropout_p == 0.0
    both = is_causal and attn_mask is not None
    wide = [lower_dequantize(*x) for x in ((query_digits, query_scale), key, value)]
    if not plain or both or not is_ieee("cpu") or not _fits_flash(*wide):
        return None
    return _attend_flash(wide[0], wide[1], wide[2], attn_mask, is_causal, scale)


# ------------------------------------------------------------------------------- few queries

Operand = tuple[Any, Any]


def _attend_few(
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Any,
    sinks: Any,
    scale: float,
    softcap: float | None,
) -> tuple[Any, Any]:
    """Scores, softmax and P V as sums; scores are `[B, H, L, S]`, the only large thing stored."""
    groups = _groups(query[1], key[1])
    scores = _scores(query, key, groups, scale)
    if softcap is not None:
        scores = mul(call(aten.tanh.default, div(scores, softcap)), softcap)
    if attn_mask is not None:
        mask = _float_mask(attn_mask, query[1], key[1])
        scores = where(equals(mask, -math.inf), -math.inf, add(scores, mask))
    scores = stored(scores)
    weights, logsumexp = _softmax(scores, sinks)
    return _weighted_sum(scores, weights, value, groups), call(aten.squeeze.dim, logsumexp, -1)


def _scores(query: Operand, key: Operand, groups: Any, scale: float) -> Any:
    """`scale * q . k`, `[B, H, L, S]`, saturated at FP32's range."""
    rows = stored(integers(query[0], torch.float32))
    keys = _repeat_heads(integers(key[0], torch.float32), groups)
    products = call(aten.sum.dim_IntList, mul(unsqueeze(rows, 3), unsqueeze(keys, 2)), [-1], False)
    key_scale = _repeat_heads(unsqueeze(key[1], -1), groups)
    scales = mul(
        fp64(unsqueeze(query[1], -1)), fp64(call(aten.permute.default, key_scale, [0, 1, 3, 2]))
    )  # in FP64, where the product of two scales neither overflows nor vanishes
    scores = mul(mul(fp64(products), scales), scale)
    return fp32(clamp(scores, -FP32.largest, FP32.largest))


def _softmax(scores: Any, sinks: Any) -> tuple[Any, Any]:
    """Weights, zeros where a row sees nothing, and `[B, H, L, 1]`: the log of the denominator."""
    top = call(aten.amax.default, scores, [-1], True)
    if sinks is not None:
        sinks = view(fp32(sinks), [1, sinks.get_size()[0], 1, 1])
        top = call(aten.maximum.default, top, sinks)
    top = stored(where(equals(top, -math.inf), 0.0, top))
    powers = stored(call(aten.exp.default, sub(scores, top)))
    denominator = total(powers, -1)
    if sinks is not None:
        denominator = add(denominator, call(aten.exp.default, sub(sinks, top)))
    denominator = stored(denominator)
    divisor = where(equals(denominator, 0.0), 1.0, denominator)
    logsumexp = add(top, call(aten.log.default, denominator))
    return div(powers, divisor), logsumexp


def _weighted_sum(scores: Any, weights: Any, value: Operand, groups: Any) -> Any:
    """P V; a row is NaN where it sees a key whose scale is NaN, and only there."""
    broken = call(aten.isnan.default, value[1])
    values = lower_dequantize(value[0], where(broken, 0.0, value[1]))
    values = unsqueeze(_repeat_heads(values, groups), 2)
    result = call(aten.sum.dim_IntList, mul(unsqueeze(stored(weights), -1), values), [3], False)
    hidden = equals(scores, -math.inf)
    flags = where(broken, 1.0, 0.0)
    flags = call(aten.permute.default, _repeat_heads(unsqueeze(flags, -1), groups), [0, 1, 3, 2])
    lost = amax(where(hidden, 0.0, flags))
    return where(equals(lost, 0.0), result, math.nan)


# ------------------------------------------------------------------------------- many queries


def _attend_flash(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float
) -> tuple[Any, Any]:
    """Torch's flash attention on FP32 states, and its logsumexp `[B, H, L]`.

    With one query, the query heads that share a key head become rows of one head, so that keys
    and values are not repeated; with more they are repeated and causality is left to the kernel.
    """
    batch, heads, length, size = query.get_size()
    groups = _groups(query, key)
    assert groups is not None, "_fits_flash has looked"
    mask = None if attn_mask is None else _float_mask(attn_mask, query, key, -2)
    if groups > 1 and not is_causal and is_static(length) and int(length) == 1:
        rows = view(query, [batch, heads // groups, groups, size])
        mask = None if mask is None else _fold_mask(mask, heads // groups, groups)
        attended, logsumexp = _flash(rows, key, value, False, mask, scale)
        return view(attended, [batch, heads, 1, size]), view(logsumexp, [batch, heads, 1])
    if groups > 1:
        key, value = (_repeat_heads(states, groups) for states in (key, value))
    return _flash(query, key, value, is_causal, mask, scale)


def _flash(
    query: Any, key: Any, value: Any, is_causal: bool, mask: Any, scale: float
) -> tuple[Any, Any]:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
    attended, logsumexp = call(
        kernel, query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return attended, logsumexp


def _fits_flash(query: Any, key: Any, value: Any) -> bool:
    """The kernel needs one head size for K and V and at least one key and one query."""
    same = same_size(query.get_size()[-1], value.get_size()[-1])
    return same and _groups(query, key) is not None and not _is_empty(query, key, value)


def _groups(query: Any, key: Any) -> int | None:
    """Query heads per key head; None if the numbers of heads are known only at run time."""
    heads, key_heads = query.get_size()[1], key.get_size()[1]
    if same_size(heads, key_heads):
        return 1
    return int(heads) // int(key_heads) if is_static(heads) and is_static(key_heads) else None


def _is_empty(*operands: Any) -> bool:
    sizes = [size for operand in operands for size in operand.get_size()]
    return any(is_static(size) and int(size) == 0 for size in sizes)


def _float_mask(attn_mask: Any, query: Any, key: Any, dim: int = -1) -> Any:
    """The mask as FP32 `[B or 1, H or 1, L, S]`, -inf where a key is hidden.

    `dim` is the dimension of `query` and `key` that counts tokens.
    """
    mask = attn_mask
    if mask.get_dtype() == torch.bool:
        mask = where(mask, 0.0, -math.inf)
    lead = list(mask.get_size())[:-2]
    lead = [1] * (2 - len(lead)) + lead
    return call(
        aten.expand.default, fp32(mask), [*lead, query.get_size()[dim], key.get_size()[dim]]
    )


def _fold_mask(mask: Any, heads: Any, groups: Any) -> Any:
    """`[B, H or 1, 1, S]` to `[B, Hkv, groups, S]`, as the folded query needs it."""
    batch, _, _, columns = mask.get_size()
    full = call(aten.expand.default, mask, [batch, heads * groups, 1, columns])
    return view(full, [batch, heads, groups, columns])


def _repeat_heads(states: Any, groups: int | None) -> Any:
    if groups in (None, 1):
        return states
    batch, heads, length, size = states.get_size()
    states = call(aten.expand.default, unsqueeze(states, 2), [batch, heads, groups, length, size])
    return view(states, [batch, heads * groups, length, size])


LOWERINGS = {
    torch.ops.heal.attention.default: lower_attention,
    torch.ops.heal.integer_attention.default: lower_integer_attention,
}
