"""Attention in FP32 on states as stored: `heal::attention` and its gradients.

The reference implementation is that of `attention.blockwise`, in FP32 throughout: `q . k`, rounded
as a matmul rounds it, and P V the same. As in any FP32 attention a key that is NaN, or that makes
a score overflow, reaches the rows that see it; a hidden one with a finite value counts for
nothing. Error: `arithmetic.attention_bounds` and `arithmetic.attention_gradients`.

`attention.sdpa` has all of SDPA's arguments. May import `tensorcore`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.ops.attention import register
from healpass.ops.attention.blockwise import fold
from healpass.ops.attention.gradients import DifferentiableAttention
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.matmul import check_operands
from healpass.ops.products.numerics import Numerics
from healpass.tensorcore.attention import weighted_values
from healpass.tensorcore.matmul import Accumulation


@dataclass(frozen=True)
class Floats:
    """One operand as stored: FP16, BF16 or FP32 `[B, H, S, E]`."""

    states: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """B, H, S, E."""
        return tuple(self.states.shape)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.states.device

    def values(self) -> Tensor:
        """`[B, H, S, E]`."""
        return self.states


class FloatAttention(DifferentiableAttention):
    """Attention on `Floats`."""

    def products(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """As matmuls of query heads that share a key head."""
        query, key = self.query.values(), self.key.values()
        for rows, columns in self.blocks():
            block = query[:, :, rows]
            keys = key[:, :, columns].flatten(0, 1).mT
            scores = self.how.multiply(fold(block, self.heads), keys) * self.scoring.scale
            yield rows, columns, scores.reshape(*block.shape[:-1], keys.shape[-1])

    def weighted_sum(self, weights: Tensor, visible: Tensor, columns: slice) -> Tensor:
        """As one matmul; simulated, with V's token scales folded into the weights."""
        del visible
        how, rows = self.how, fold(weights, self.heads)
        value = self.value.values()[:, :, columns].flatten(0, 1)
        if how.simulate is not None and how.precision == "heal":
            adders = Accumulation(how.simulate, order=how.order)
            result = weighted_values(rows, value, adders)
        else:
            result = how.multiply(rows, value)
        return result.reshape(*weights.shape[:-1], value.shape[-1])


def read(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> FloatAttention:
    """Read and check the arguments of one call.

    Args:
        query: FP16, BF16 or FP32 `[B, H, L, E]`; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`; its dtype may differ from the query's, as 16-bit caches do.
        value: `[B, Hkv, S, Ev]`; Ev may differ from E.
        *rest: What `Scoring.read` takes, and `numerics` as `heal::mm` does.

    Raises:
        TypeError: Another dtype.
        RuntimeError: Ranks or sizes do not fit, or the seed is missing.
        ValueError: `numerics` is unknown.
    """
    *scoring, numerics = rest
    check_operands("attention", numerics, query, key, value)
    torch._check(
        query.dim() == key.dim() == value.dim() == 4,
        lambda: "heal::attention needs [B, H, L, E] tensors; heal::sdpa takes other ranks",
    )
    torch._check(
        query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2],
        lambda: "heal::attention: head sizes of Q and K, or lengths of K and V, differ",
    )
    states, how = (Floats(query), Floats(key), Floats(value)), Scoring.read(*scoring)
    how.check_mask(query.shape, key.shape)
    return FloatAttention(*states, how, Numerics.parse(numerics))


OPERATORS = register.define("attention", "Tensor query, Tensor key, Tensor value", read)


# --------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.rest = inputs[6:]


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, output, logsumexp = ctx.saved_tensors
    call, needed = (*tensors, *ctx.rest), ctx.needs_input_grad
    found = OPERATORS.gradients(grad, call, (output, logsumexp), needed[:5])
    states = [
        None if x is None else x.to(operand.dtype)
        for x, operand in zip(found[:3], tensors[:3], strict=True)
    ]
    return (*states, *found[3:], *[None] * (1 + len(ctx.rest)))


OPERATORS.attend.register_autograd(_backward, setup_context=_save)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:-2]


def _second_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative: of the reference, which is differentiable as it stands.

    The output and the logsumexp are functions of the other operands, so that the whole derivative
    with regard to those is theirs.
    """
    tensors, needed = list(ctx.saved_tensors), ctx.needs_input_grad[:7]
    wanted = [index for index, need in enumerate(needed) if need]
    with torch.enable_grad():
        for index in {*wanted, 1, 2, 3}:
            tensors[index] = tensors[index].detach().requires_grad_()
        output, _ = read(*tensors[1:], *ctx.rest).attend()
        first = torch.autograd.grad(output, tensors[1:4], tensors[0], create_graph=True)
    leaves = [tensors[index] for index in wanted]
    second = dict(zip(wanted, torch.autograd.grad(first, leaves, grads), strict=True))
    return (*map(second.get, range(7)), *[None] * (len(ctx.rest) + 2))


OPERATORS.backward.register_autograd(_second_backward, setup_context=_save_backward)
