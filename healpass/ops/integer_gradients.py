"""Gradients of `heal::integer_attention`. May import `ops.integer_attention` and below.

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
from typing import Any

import torch
from torch import Tensor

from healpass.ops.ieee import ieee_fp32
from healpass.ops.integer_attention import CALL, Problem, fold, problem
from healpass.ops.scores import Scoring


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


def _blocks(asked: Problem, grad: Tensor, output: Tensor, logsumexp: Tensor) -> Iterator[Block]:
    scoring, value = asked.scoring, asked.value.values().flatten(0, 1)
    inner = (grad * output).sum(-1, keepdim=True)
    for rows, columns, products in asked.products():
        capped, slope = scoring.cap(products)
        scores = scoring.hide(capped, rows, columns)
        weights = torch.exp(scores - logsumexp[..., rows, None])
        weights = weights.masked_fill(scores == -torch.inf, 0.0)  # also where no key is visible
        part = grad[:, :, rows]
        grad_weights = asked.how.multiply(fold(part, asked.heads), value[:, columns].mT).reshape(
            weights.shape
        )
        kept = scoring.survivors(grad.shape, rows, columns)
        dropped = weights if kept is None else weights * kept
        grad_weights = grad_weights if kept is None else grad_weights * kept
        grad_scores = weights * (grad_weights - inner[:, :, rows])
        yield Block(rows, columns, part, dropped, grad_scores, slope)


_SCHEMA = f"(Tensor grad, {CALL}, Tensor output, Tensor logsumexp)"


@torch.library.custom_op(
    "heal::integer_attention_backward",
    mutates_args=(),
    schema=f"{_SCHEMA} -> (Tensor, Tensor, Tensor)",
)
def integer_attention_backward(grad: Tensor, *call: Any) -> tuple[Tensor, ...]:
    """Gradients with regard to the dequantized Q, K and V, in FP32 and in their shapes.

    Args:
        grad: FP32 `[B, H, L, Ev]`.
        *call: The arguments of `heal::integer_attention` (see `problem`) and its two results.
    """
    *arguments, output, logsumexp = call
    asked = problem(*arguments)
    multiply, heads, scale = asked.how.multiply, asked.heads, asked.scoring.scale
    query, key = asked.query.values(), asked.key.values()
    of_query, of_key, of_value = (grad_like.zero_() for grad_like in _gradients(asked))
    with ieee_fp32(grad.device.type):
        for block in _blocks(asked, grad, output, logsumexp):
            rows, columns = block.rows, block.columns
            products = fold(block.grad_products, heads) * scale
            part = multiply(products, key[:, :, columns].flatten(0, 1))
            of_query[:, :, rows] = part.reshape(of_query[:, :, rows].shape)
            part = multiply(products.mT, fold(query[:, :, rows], heads))
            of_key[:, :, columns] += part.reshape(of_key[:, :, columns].shape)
            part = multiply(fold(block.weights, heads).mT, fold(block.grad, heads))
            of_value[:, :, columns] += part.reshape(of_value[:, :, columns].shape)
    return of_query, of_key, of_value


@integer_attention_backward.register_fake
def _(grad: Tensor, *call: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    return _gradients(problem(*call[:-2]))


def _gradients(asked: Problem) -> tuple[Tensor, ...]:
    """Memory for the gradients of Q, K and V."""
    operands = (asked.query, asked.key, asked.value)
    return tuple(x.scale.new_empty((*x.scale.shape, x.digits.shape[-1])) for x in operands)


@torch.library.custom_op(
    "heal::integer_attention_mask_grad", mutates_args=(), schema=f"{_SCHEMA} -> Tensor"
)
def integer_attention_mask_grad(grad: Tensor, *call: Any) -> Tensor:
    """The gradient of a float mask, in FP32 and in its shape; arguments as in the backward."""
    *arguments, output, logsumexp = call
    asked = problem(*arguments)
    assert asked.scoring.attn_mask is not None, "asked for the gradient of a mask"
    result = torch.zeros_like(asked.scoring.attn_mask, dtype=torch.float32)
    into = Scoring(asked.scoring.scale, attn_mask=result)
    with ieee_fp32(grad.device.type):
        for block in _blocks(asked, grad, output, logsumexp):
            part = into.mask_block(block.rows, block.columns)
            assert part is not None, "the block of a mask"
            part += block.grad_scores.sum_to_size(part.shape)
    return result


@integer_attention_mask_grad.register_fake
def _(grad: Tensor, *call: Any) -> Tensor:  # noqa: ARG001
    mask = problem(*call[:-2]).scoring.attn_mask
    assert mask is not None, "asked for the gradient of a mask"
    return torch.empty_like(mask, dtype=torch.float32)
