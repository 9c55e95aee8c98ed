"""Torch's FP32 flash kernel on CPU: what it can do, and its operands. May import `ops`.

It attends one query on states as stored, where it is faster than the kernel of `cpu.attention`,
and computes the gradients.
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
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.ieee import is_ieee


def attend_one(query: Any, key: Any, value: Any, scoring: Scoring) -> tuple[Any, Any] | None:
    """One query of FP32 states: output and logsumexp; None where the kernel cannot, or is slower.

    Query heads that share a key head become rows of one head: nothing is repeated.

    Args:
        query: `[B, H, L, E]`, L being 1; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`.
        value: `[B, Hkv, S, Ev]`.
        scoring: Scale and mask are taken; with anything else the result is None.
    """
    batch, heads, length, size = query.get_size()
    one = is_static(length) and int(length) == 1 and not scoring.is_causal
    wide = all(x.get_dtype() == torch.float32 for x in (query, key, value))
    if not one or not wide or not fits_flash(scoring, query, key, value):
        return None
    groups = groups_of(query, key)
    assert groups is not None, "fits_flash has looked"
    shape, mask = [batch, heads // groups, groups], None
    if scoring.attn_mask is not None:
        mask = float_mask(scoring.attn_mask, query, key)
        keys = mask.get_size()[-1]
        mask = view(call(aten.expand.default, mask, [batch, heads, 1, keys]), [*shape, keys])
    kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
    output, logsumexp = call(
        kernel, view(query, [*shape, size]), key, value, 0.0, attn_mask=mask, scale=scoring.scale
    )
    if mask is not None:  # where nothing is seen the kernel says 0
        hidden = equals(call(aten.amax.default, mask, [-1], False), -math.inf)
        logsumexp = where(hidden, -math.inf, logsumexp)
    return view(output, [batch, heads, 1, size]), view(logsumexp, [batch, heads, 1])


def fits_flash(scoring: Scoring, query: Any, key: Any, value: Any) -> bool:
    """Whether torch's kernel can do it, in FP32.

    It takes a mask or causality, one head size for K and V, and at least one key and one query.

    Args:
        scoring: All that decides a weight besides Q and K.
        query: `[B, H, L, E]`; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`.
        value: `[B, Hkv, S, Ev]`.
    """
    both = scoring.is_causal and scoring.attn_mask is not None
    if both or not scoring.is_plain or not is_ieee("cpu"):
        return False
    sizes = [size for operand in (query, key, value) for size in operand.get_size()]
    if any(is_static(size) and int(size) == 0 for size in sizes):
        return False
    same = same_size(query.get_size()[-1], value.get_size()[-1])
    return same and groups_of(query, key) is not None


def groups_of(query: Any, key: Any) -> int | None:
    """Query heads per key head; None if the numbers of heads are known only at run time."""
    heads, key_heads = query.get_size()[1], key.get_size()[1]
    if same_size(heads, key_heads):
        return 1
    return int(heads) // int(key_heads) if is_static(heads) and is_static(key_heads) else None


def float_mask(attn_mask: Any, query: Any, key: Any) -> Any:
    """The mask as FP32 `[B or 1, H or 1, L, S]`, -inf where a key is hidden.

    Args:
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[B, H, L, S]`.
        query: `[..., L, E]`, whose L is read.
        key: `[..., S, E]`, whose S is read.
    """
    mask = attn_mask
    if mask.get_dtype() == torch.bool:
        mask = where(mask, 0.0, -math.inf)
    lead = list(mask.get_size())[:-2]
    lead = [1] * (2 - len(lead)) + lead
    return call(aten.expand.default, fp32(mask), [*lead, query.get_size()[2], key.get_size()[2]])


def repeat_heads(states: Any, groups: int) -> Any:
    """Each head of `[B, Hkv, S, E]` once per query head."""
    if groups == 1:
        return states
    batch, heads, length, size = states.get_size()
    states = call(aten.expand.default, unsqueeze(states, 2), [batch, heads, groups, length, size])
    return view(states, [batch, heads * groups, length, size])
