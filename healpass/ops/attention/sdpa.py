"""`heal::sdpa` (composite): all of SDPA's arguments, and those of current models, in every format.

`kv="fp32"` attends in FP32 (`heal::attention`); `int16` and `int24` quantize Q, K and V
(`heal::quantize`) and attend over integers (`heal::integer_attention`). Both take windows, caps,
sinks and dropout, and neither holds the scores of a whole sequence. With an exact `numerics` the
attention over integers has the same bits everywhere, unless it draws random numbers.

May import `attention.floats`, `attention.integers` and below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from healpass.errors import OperandError
from healpass.ops.attention.exact_capped import attend_by_weights
from healpass.ops.attention.integers import OPERATORS
from healpass.ops.attention.quantize import FORMATS
from healpass.ops.attention.scoring import Scoring
from healpass.ops.library import library
from healpass.ops.products.matmul import check_operands
from healpass.ops.products.numerics import Numerics

library.define(
    "sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False, SymInt? window=None, "
    "float? softcap=None, Tensor? sinks=None, Tensor? seed=None, "
    'str kv="fp32", str numerics="heal") -> Tensor'
)


@torch.library.impl(library, "sdpa", "CompositeImplicitAutograd")
def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    seed: Tensor | None = None,
    kv: str = "fp32",
    numerics: str = "heal",
) -> Tensor:
    """`F.scaled_dot_product_attention` in FP32: all its arguments, any leading dimensions.

    Args:
        query: `[..., H, L, E]`.
        key: `[..., Hkv, S, E]`; leading dimensions broadcast with the query's.
        value: `[..., Hkv, S, Ev]`.
        attn_mask: Bool or float, broadcastable to `[..., H, L, S]`; excludes `is_causal`.
        dropout_p: Probability of dropping a weight.
        is_causal: As in torch: counted from the first query and the first key.
        scale: Factor of the scores, `1 / sqrt(E)` if None.
        enable_gqa: Allow `H` to be a multiple of `Hkv`.
        window: Hide key s from query l where s <= l - window.
        softcap: Scores become `softcap * tanh(score / softcap)` before the mask.
        sinks: `[H]`: one more logit per head, in the denominator only.
        seed: INT64 with one element: what dropout draws from. One of torch's random numbers if
            None, so that checkpointing replays it.
        kv: `fp32`, or `int16` or `int24`: the format that Q, K and V are rounded to first. The
            gradient goes through that rounding as if it were the identity.
        numerics: As `heal::mm`; an exact precision needs `int16` or `int24`.
    """
    check_operands("sdpa", numerics, query, key, value)
    torch._check(
        not (is_causal and attn_mask is not None),
        lambda: "heal::sdpa: attn_mask and is_causal exclude each other, as in torch",
    )
    if dropout_p > 0 and seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
    factor = default_scale(query.shape[-1]) if scale is None else scale
    shape = (*leading(query, key, value, enable_gqa), query.shape[-2], value.shape[-1])
    states = four_dimensional(query, key, value, enable_gqa)
    mask = None if attn_mask is None else mask_four_dimensional(attn_mask, shape)
    scoring = Scoring(factor, mask, sinks, seed, is_causal, window, softcap, dropout_p)
    scoring.check_mask(states[0].shape, states[1].shape)
    return _attention(scoring, kv, numerics)(*states, scoring, kv, numerics).reshape(shape)


def default_scale(size: int) -> float:
    """The factor of the scores for heads of `size` elements, as torch computes it."""
    return 1.0 / math.sqrt(size)


def _attention(scoring: Scoring, kv: str, numerics: str) -> Callable[..., Tensor]:
    """What attends: `[B, H, L, E]`, `[B, Hkv, S, E]`, `[B, Hkv, S, Ev]`, and the arguments."""
    exact = Numerics.parse(numerics).products is not None and scoring.dropout_p == 0.0
    if exact and kv not in FORMATS:
        raise OperandError(
            f"heal::sdpa got kv={kv!r} with numerics={numerics!r}, and exact attention is one of "
            f"integers.\nUse kv={' or '.join(map(repr, FORMATS))}."
        )
    if exact and (scoring.softcap is not None or scoring.sinks is not None):
        return _attend_by_weights
    return _attend_fp32 if kv == "fp32" else _attend_integers


def _attend_fp32(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, kv: str, numerics: str
) -> Tensor:
    del kv
    result: Tensor = torch.ops.heal.attention(query, key, value, *scoring.arguments, numerics)[0]
    return result


def _attend_by_weights(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, kv: str, numerics: str
) -> Tensor:
    return attend_by_weights((query, key, value), scoring, kv, numerics)


def _attend_integers(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, kv: str, numerics: str
) -> Tensor:
    result: Tensor = _ThroughIntegers.apply(
        query, key, value, scoring.attn_mask, scoring.sinks, scoring, kv, numerics
    )
    return result


class _ThroughIntegers(torch.autograd.Function):
    """Quantize and attend; the gradient of the rounding is the identity.

    What is kept for the backward pass are the integers, half or three quarters of FP32's bytes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        scoring: Scoring,
        kv: str,
        numerics: str,
    ) -> Tensor:
        del attn_mask, sinks  # autograd sees them here, the operator takes them from `scoring`
        digits = [part for x in (query, key, value) for part in torch.ops.heal.quantize(x, kv)]
        tensors = (*digits, *scoring.arguments[:3])
        ctx.rest = (*scoring.arguments[3:], numerics)
        output, logsumexp = torch.ops.heal.integer_attention(*tensors, *ctx.rest)
        ctx.save_for_backward(*tensors, output, logsumexp)
        ctx.dtypes = [x.dtype for x in (query, key, value)]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output, logsumexp = ctx.saved_tensors
        call, wanted = (*tensors, *ctx.rest), ctx.needs_input_grad[:5]
        found = OPERATORS.gradients(grad, call, (output, logsumexp), wanted)
        states = [
            None if x is None else x.to(dtype)
            for x, dtype in zip(found[:3], ctx.dtypes, strict=True)
        ]
        return (*states, *found[3:], None, None, None)


def leading(query: Tensor, key: Tensor, value: Tensor, gqa: bool) -> tuple[int, ...]:
    """The result's dimensions before `[L, Ev]`.

    Args:
        query: `[..., H, L, E]`.
        key: `[..., Hkv, S, E]`.
        value: `[..., Hkv, S, Ev]`.
        gqa: H may be a multiple of Hkv; else the dimensions of heads broadcast, too.
    """
    if not gqa:
        leads = (query.shape[:-2], key.shape[:-2], value.shape[:-2])
        return tuple(torch.broadcast_shapes(*leads))
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    return (*batch, query.shape[-3])


def four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcast leading dimensions and fold them into `[B, H, ., .]`.

    Args:
        query: `[..., H, L, E]`.
        key: `[..., Hkv, S, E]`.
        value: `[..., Hkv, S, Ev]`.
        gqa: As in `leading`; Hkv stays as it is then.
    """
    lead = leading(query, key, value, gqa)
    batch = math.prod(lead[:-1])

    def fold(states: Tensor) -> Tensor:
        heads = (states.shape[-3] if gqa else lead[-1]) if lead else 1
        states = states.expand(*lead[:-1], *((heads,) if lead else ()), *states.shape[-2:])
        return states.reshape(batch, heads, *states.shape[-2:])

    return fold(query), fold(key), fold(value)


def mask_four_dimensional(attn_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Fold a mask for `[..., H, L, S]` into one that broadcasts to `[B, H, L, S]`."""
    lead = shape[:-2]
    if attn_mask.dim() <= 3 and len(lead) >= 2:
        return attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    if attn_mask.dim() == 4 and len(lead) == 2:
        return attn_mask
    sizes = attn_mask.shape[-2:] if attn_mask.dim() > 1 else (1, attn_mask.shape[-1])
    full = attn_mask.expand(*lead, *sizes)
    return full.reshape(math.prod(lead[:-1]), lead[-1] if lead else 1, *sizes)
