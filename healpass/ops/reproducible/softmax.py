"""Bit-reproducible softmax and cross entropy: `heal::softmax`, `log_softmax`, `cross_entropy`.

The maximum is exact in any order; exp(x - max) is FP64 (`reproducible.fp64`); the denominator is
the exact sum of those numbers in units of 2^-40, so it does not depend on how many hidden keys or
tiles there are. The result is rounded once: softmax is within (1/2 + 2^-10) ulp + K 2^-41 of
itself for K terms, log_softmax within that of its largest part. Imports `reproducible.reduce`.

A row with a NaN or +inf, and a row of nothing but -inf, is NaN, as in torch; -inf elsewhere is a
weight of 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from healpass.ops.library import library
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import element_bits, from_integers, sum_fp64
from healpass.ops.reproducible.register import register

heal = torch.ops.heal


def exponentials(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of FP64 `x` along `dim`: x - max, exp(x - max), and their sum, kept with size 1."""
    below = x - x.amax(dim, keepdim=True)
    weights = fp64.exp(below)
    valid = (below <= 0.0).all(dim, keepdim=True)
    return below, weights, torch.where(valid, denominator(weights, dim), math.nan)


def denominator(weights: Tensor, dim: int) -> Tensor:
    """The exact sum of FP64 `weights` in [0, 1], each rounded to 2^-40, kept with size 1."""
    bits = element_bits(weights.shape[dim])
    total = torch.round(weights * 2.0**bits).to(torch.int64).sum(dim, keepdim=True)
    return from_integers(total) * 2.0**-bits


def _softmax(input: Tensor, dim: int) -> Tensor:
    """exp(x) / sum(exp(x)) along `dim`."""
    if input.dim() == 0:
        return _softmax(input.reshape(1), 0).reshape(())
    if input.numel() == 0:
        return _like(input, dim)
    _, weights, total = exponentials(fp64.to_fp64(input), dim)
    return fp64.to_fp32(weights / total)


def _log_softmax(input: Tensor, dim: int) -> Tensor:
    """X - max - log(sum(exp(x - max))) along `dim`."""
    if input.dim() == 0:
        return _log_softmax(input.reshape(1), 0).reshape(())
    if input.numel() == 0:
        return _like(input, dim)
    below, _, total = exponentials(fp64.to_fp64(input), dim)
    return fp64.to_fp32(below - fp64.log(total))


def _like(input: Tensor, dim: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(fp64.checked(input), dtype=torch.float32)


def _softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """Y (g - sum(g y))."""
    g, y = fp64.to_fp64(grad), fp64.to_fp64(output)
    dims = [dim % grad.dim()] if grad.dim() else []
    return fp64.to_fp32(y * (g - sum_fp64(g * y, dims)))


def _log_softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """G - exp(y) sum(g)."""
    g, y = fp64.to_fp64(grad), fp64.to_fp64(output)
    dims = [dim % grad.dim()] if grad.dim() else []
    return fp64.to_fp32(g - fp64.exp(y) * sum_fp64(g, dims))


def _backward_like(grad: Tensor, output: Tensor, dim: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.dim, ctx.dtype = inputs[1], inputs[0].dtype


def _gradient(name: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        operator = getattr(heal, f"{name}_backward")
        return operator(grad, output, ctx.dim).to(ctx.dtype), None

    return backward


for _name, _meaning, _slope in (
    ("softmax", _softmax, _softmax_backward),
    ("log_softmax", _log_softmax, _log_softmax_backward),
):
    register(
        f"{_name}_backward(Tensor grad, Tensor output, int dim) -> Tensor", _slope, _backward_like
    )
    register(f"{_name}(Tensor input, int dim) -> Tensor", _meaning, _like, _gradient(_name), _save)


# -------------------------------------------------------------------------------- cross entropy

library.define(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
    'str reduction="mean", float label_smoothing=0.0) -> Tensor'
)
library.define(
    "nll_loss(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, "
    'str reduction="mean") -> Tensor'
)


@torch.library.impl(library, "cross_entropy", "CompositeImplicitAutograd")
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy` in exact sums: `[N, C]`, `[C]` or `[N, C, ...]`, classes or probabilities.

    As torch: smoothing mixes the loss of the target with the (weighted) mean over the classes, and
    `mean` divides by the summed weights of the targets that count.
    """
    classes = 0 if input.dim() == 1 else 1
    logs = heal.log_softmax(input, classes)
    if target.is_floating_point():
        return _soft_loss(logs, target, weight, reduction, label_smoothing, classes)
    loss = heal.nll_loss(logs, target, weight, ignore_index, reduction)
    if label_smoothing == 0.0:
        return loss
    weighted = logs if weight is None else heal.mul(logs, _along(weight, logs, classes))
    kept = target != ignore_index
    uniform = torch.where(kept, -heal.sum(weighted, [classes], False), 0.0)
    if reduction == "mean":
        uniform = heal.div(heal.sum(uniform), _target_weights(logs, target, kept, weight))
    elif reduction == "sum":
        uniform = heal.sum(uniform)
    share = label_smoothing / input.shape[classes]
    return heal.add(loss * (1.0 - label_smoothing), uniform * share)


@torch.library.impl(library, "nll_loss", "CompositeImplicitAutograd")
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`F.nll_loss` in exact sums, for `[N, C]`, `[C]` or `[N, C, ...]` log-probabilities."""
    classes = 0 if input.dim() == 1 else 1
    kept = target != ignore_index
    index = torch.where(kept, target, 0).unsqueeze(classes)
    picked = -input.to(torch.float32).gather(classes, index).squeeze(classes)
    if weight is not None:
        picked = heal.mul(picked, weight[index.squeeze(classes)])
    picked = torch.where(kept, picked, 0.0)
    if reduction == "none":
        return picked
    total = heal.sum(picked)
    if reduction == "sum":
        return total
    return heal.div(total, _target_weights(input, target, kept, weight))


def _target_weights(logs: Tensor, target: Tensor, kept: Tensor, weight: Tensor | None) -> Tensor:
    """The sum of the weights of the targets that count, FP32."""
    if weight is None:
        return kept.sum().to(torch.float32)
    del logs
    return heal.sum(torch.where(kept, weight[torch.where(kept, target, 0)], 0.0))


def _soft_loss(
    logs: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    smoothing: float,
    classes: int,
) -> Tensor:
    """Targets that are probabilities; `mean` divides by the number of rows."""
    target = target.to(torch.float32)
    if smoothing > 0.0:
        target = target * (1.0 - smoothing) + smoothing / logs.shape[classes]
    products = heal.mul(logs, target)
    if weight is not None:
        products = heal.mul(products, _along(weight, logs, classes))
    losses = -heal.sum(products, [classes], False)
    if reduction == "none":
        return losses
    total = heal.sum(losses)
    rows = float(math.prod(logs.shape) // logs.shape[classes])
    return total if reduction == "sum" else heal.div(total, total.new_full((), rows))


def _along(weight: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector over the classes, shaped to broadcast."""
    return weight.reshape([-1 if d == dim else 1 for d in range(like.dim())])
