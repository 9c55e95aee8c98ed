"""How a GPU, or another order of summation, adds the sums of a model that is not rewritten.

Layer: study. Imports `tensorcore` and `plan.configuration`.

`backend="heal"` simulates what it rewrites. The study's baselines are not rewritten, so their
linear layers and attention are given the same adders here: 16-bit operands on a tensor core, all
of K in one chain as vendor libraries run it, and FP32 by fused multiply-adds. Attention rounds P
to the model's dtype and keeps scores in FP32, as fused attention kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.study.plan.configuration import Configuration
from healpass.tensorcore import Schedule, simulate_matmul

Multiply = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Products:
    """The two matmuls of attention: Q by K^T, and P by V."""

    scores: Multiply
    values: Multiply


def baseline_functions(configuration: Configuration) -> dict[Any, Callable[..., Any]]:
    """What stands for torch's functions in a baseline's graph; {} where they are as they are."""
    c = configuration
    if not c.is_baseline or not (c.order or c.gpu):
        return {}
    multiply = multiplier(c.gpu, c.order)
    products = Products(multiply, multiply)
    return {
        torch._C._nn.linear: lambda x, w, b=None: linear(multiply, x, w, b),
        torch._C._nn.scaled_dot_product_attention: lambda *a, **k: attention(products, *a, **k),
    }


def multiplier(gpu: str | None, order: int) -> Multiply:
    """`[..., M, K]` by `[..., K, N]` in one dtype, summed in FP32 as asked."""

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        if gpu is None:
            seed = torch.Generator().manual_seed(order)
            k = torch.randperm(a.shape[-1], generator=seed) if order else slice(None)
            return a[..., k].float() @ b[..., k, :].float()
        rule = "sgemm" if a.dtype == torch.float32 else gpu
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        left = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
        right = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
        products = [
            simulate_matmul([x], [y], rule, Schedule(promote_every=None, order=order))
            for x, y in zip(left, right, strict=True)
        ]
        return torch.stack(products).reshape(*batch, a.shape[-2], b.shape[-1])

    return multiply


def linear(multiply: Multiply, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, `[..., K]` by `[N, K]`, rounded once to the dtype of `x`.

    Args:
        multiply: Gives `[M, K]` by `[K, N]`, both in one dtype, in FP32.
        x: `[..., K]` in the model's dtype.
        weight: `[N, K]` in the same.
        bias: `[N]`, added in FP32; or None.
    """
    y = multiply(x.reshape(-1, x.shape[-1]), weight.t())
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def attention(
    products: Products,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(Q K^T * scale + mask) V`, `[B, H, L, E]`, as torch defines it.

    Args:
        products: Who multiplies; both give FP32.
        query: `[..., H, L, E]` in the model's dtype.
        key: `[..., Hkv, S, E]`.
        value: `[..., Hkv, S, Ev]`.
        attn_mask: Bool (True is visible) or float (added), broadcastable to `[..., H, L, S]`.
        dropout_p: 0; anything else is refused.
        is_causal: Hide key s from query l where s > l.
        scale: Factor of the scores, `1 / sqrt(E)` if None.
        enable_gqa: Allow H to be a multiple of Hkv.
    """
    if dropout_p:
        raise ValueError("the study runs models in evaluation mode, without dropout")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = products.scores(query, key.transpose(-1, -2)) * scale
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_bool else scores + attn_mask
    probs = scores.softmax(-1).nan_to_num(0.0)  # a row that sees nothing is 0, as in torch
    return products.values(probs.to(value.dtype), value).to(query.dtype)
