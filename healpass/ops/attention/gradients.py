"""Attention by blocks with its gradients, block by block as the forward pass.

With P the weights after the softmax, K the dropout's factors, G what comes in, O the output::

    dV = (P * K)^T G          dP = K * (G V^T)          dS = P * (dP - rowsum(G * O))
    dQ = scale * (dS * slope) K        dK = scale * (dS * slope)^T Q        d mask = dS
    d sink = -sum over rows of exp(sink - logsumexp) * rowsum(G * O)

where slope is the derivative of the cap. P is computed again from the scores, block by block, as
`exp(score - logsumexp)`: the logarithm was rounded once, which moves P by `2^-24 |logsumexp|`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.ops.attention.blockwise import Attends, Attention, fold
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.ieee import ieee_fp32


@dataclass(frozen=True)
class Block:
    """One block of the backward pass.

    Attributes:
        rows: The queries.
        columns: The keys.
        grad: `[B, H, rows, Ev]`.
        weights: P times the dropout's factors, `[B, H, rows, columns]`.
        grad_scores: dS, with regard to the masked score.
        slope: Derivative of the cap, or None.
    """

    rows: slice
    columns: slice
    grad: Tensor
    weights: Tensor
    grad_scores: Tensor
    slope: Tensor | None

    @property
    def grad_products(self) -> Tensor:
        """The gradient with regard to `scale * (q . k)`."""
        return self.grad_scores if self.slope is None else self.grad_scores * self.slope


class DifferentiableAttention(Attention):
    """`Attention` and the gradients of its operands."""

    def gradients(self, grad: Tensor, output: Tensor, logsumexp: Tensor) -> tuple[Tensor, ...]:
        """Gradients with regard to the values of Q, K and V, in FP32.

        Args:
            grad: FP32 `[B, H, L, Ev]`.
            output: Of the forward pass.
            logsumexp: Of the forward pass.
        """
        multiply, heads, scale = self.how.multiply, self.heads, self.scoring.scale
        query, key = self.query.values(), self.key.values()
        of_query, of_key, of_value = (grad_like.zero_() for grad_like in memory(self))
        with ieee_fp32(grad.device.type):
            for block in self._blocks(grad, output, logsumexp):
                rows, columns = block.rows, block.columns
                products = fold(block.grad_products, heads) * scale
                part = multiply(products, key[:, :, columns].flatten(0, 1))
                of_query[:, :, rows] = part.reshape(of_query[:, :, rows].shape)
                part = multiply(products.mT, fold(query[:, :, rows], heads))
                of_key[:, :, columns] += part.reshape(of_key[:, :, columns].shape)
                part = multiply(fold(block.weights, heads).mT, fold(block.grad, heads))
                of_value[:, :, columns] += part.reshape(of_value[:, :, columns].shape)
        return of_query, of_key, of_value

    def mask_gradient(self, grad: Tensor, output: Tensor, logsumexp: Tensor) -> Tensor:
        """The gradient of a float mask, in FP32 and in its shape.

        Args:
            grad: FP32 `[B, H, L, Ev]`.
            output: FP32 `[B, H, L, Ev]`, of the forward pass.
            logsumexp: FP32 `[B, H, L]`, of the forward pass.
        """
        assert self.scoring.attn_mask is not None, "asked for the gradient of a mask"
        result = torch.zeros_like(self.scoring.attn_mask, dtype=torch.float32)
        into = Scoring(self.scoring.scale, attn_mask=result)
        with ieee_fp32(grad.device.type):
            for block in self._blocks(grad, output, logsumexp):
                part = into.mask_block(block.rows, block.columns)
                assert part is not None, "the block of a mask"
                part += block.grad_scores.sum_to_size(part.shape)
        return result

    def _blocks(self, grad: Tensor, output: Tensor, logsumexp: Tensor) -> Iterator[Block]:
        scoring, value = self.scoring, self.value.values().flatten(0, 1)
        inner = (grad * output).sum(-1, keepdim=True)
        for rows, columns, products in self.products():
            capped, slope = scoring.cap(products)
            scores = scoring.hide(capped, rows, columns)
            weights = torch.exp(scores - logsumexp[..., rows, None])
            weights = weights.masked_fill(scores == -torch.inf, 0.0)  # also where none is visible
            part, keys = grad[:, :, rows], value[:, columns].mT
            grad_weights = self.how.multiply(fold(part, self.heads), keys).reshape(weights.shape)
            kept = scoring.survivors(grad.shape, rows, columns)
            dropped = weights if kept is None else weights * kept
            grad_weights = grad_weights if kept is None else grad_weights * kept
            grad_scores = weights * (grad_weights - inner[:, :, rows])
            yield Block(rows, columns, part, dropped, grad_scores, slope)


def memory(asked: Attends) -> tuple[Tensor, ...]:
    """Memory for the gradients of Q, K and V, in FP32 and in their shapes."""
    operands = (asked.query, asked.key, asked.value)
    return tuple(torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in operands)


@torch.library.custom_op("heal::attention_sinks_grad", mutates_args=())
def sinks_gradient(sinks: Tensor, grad: Tensor, output: Tensor, logsumexp: Tensor) -> Tensor:
    """The gradient of the sinks `[H]`, in their dtype; the other arguments as in `gradients`."""
    share = torch.exp(sinks[:, None] - logsumexp)
    return -(share * (grad * output).sum(-1)).sum((0, 2)).to(sinks.dtype)


@sinks_gradient.register_fake
def _(sinks: Tensor, grad: Tensor, output: Tensor, logsumexp: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(sinks)
