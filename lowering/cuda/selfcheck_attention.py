"""The attention templates' part of `selfcheck`: small problems, and what they may be off by.

A result has to be as close to FP64 as attention in FP32 would have to be. With u = 2^-24 and D the
largest scale * |q| . |k| and score: a score is off by (E + 4) u D, a weight by twice that and by
(S + 8) u of itself, a sum of n weighted values by n u. Gradients go through the longest chain of
sums: over E, EV, S and all rows. May import the operators.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.ops.attention.quantize import integers
from healpass.ops.attention.scoring import Scoring

UNIT = 2.0**-24


@dataclass(frozen=True)
class AttentionCheck:
    """A small attention, forward and backward: three query heads per key head."""

    templates: tuple[str, ...]
    kv: str
    length: int
    keys: int
    head_size: int = 16
    value_size: int = 24
    is_causal: bool = False

    #: Query heads that share a key head.
    GROUP = 3

    def scoring(self) -> Scoring:
        """A mask that hides some keys, a window, a cap and sinks: every branch of the kernels."""
        generator = torch.Generator().manual_seed(1)
        mask = torch.randn(self.length, self.keys, generator=generator)
        mask = mask.masked_fill(mask > 1, -math.inf)
        return Scoring(
            self.head_size**-0.5, mask, torch.randn(self.GROUP, generator=generator), None,
            self.is_causal, self.keys - 3, 6.0,
        )  # fmt: skip

    @property
    def operator(self) -> str:
        """The name of the format's operator."""
        return "attention" if self.kv == "fp32" else "integer_attention"

    def operands(self) -> tuple[Tensor, ...]:
        """Q, K and V as the operator takes them, and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        sizes = (
            (self.GROUP, self.length, self.head_size),
            (1, self.keys, self.head_size),
            (1, self.keys, self.value_size),
        )
        states = [torch.randn(2, *size, generator=generator) / 2 for size in sizes]
        grad = torch.randn(2, self.GROUP, self.length, self.value_size, generator=generator)
        if self.kv == "fp32":
            return (*states, grad)
        return (*(part for x in states for part in torch.ops.heal.quantize(x, self.kv)), grad)

    def values(self) -> tuple[Tensor, ...]:
        """What the operands stand for, and the gradient, in FP64."""
        *parts, grad = self.operands()
        if self.kv == "fp32":
            return tuple(x.double() for x in (*parts, grad))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        states = (integers(digits) * scale.double()[..., None] for digits, scale in pairs)
        return (*states, grad.double())

    def call(self) -> tuple[object, ...]:
        """The arguments of the operator."""
        return (*self.operands()[:-1], *self.scoring().arguments, "heal")


#: Output, logsumexp and the gradients of Q, K and V of a check.
Attend = Callable[[AttentionCheck], tuple[Tensor, ...]]
FORWARD, MERGE = "attention", "attention_merge"
BACKWARD = ("attention_backward_query", "attention_backward_key")


def checks() -> Iterator[AttentionCheck]:
    """Both families and formats; few keys, so that the promise notices a lost piece."""
    for kv in ("int16", "int24", "fp32"):
        yield AttentionCheck((FORWARD,), kv, length=20, keys=20, is_causal=True)
        yield AttentionCheck((FORWARD, MERGE), kv, length=2, keys=20)
    yield AttentionCheck((FORWARD, MERGE), "int16", length=1, keys=600)
    yield AttentionCheck((FORWARD,), "int16", length=70, keys=70, head_size=128, value_size=128)
    yield AttentionCheck((FORWARD,), "int16", length=20, keys=40, head_size=256, value_size=256)


def examine(attend: Attend) -> dict[str, str]:
    """Run every check; what is wrong, by template."""
    wrong: dict[str, str] = {}
    for check in checks():
        blamed = (check.templates,) * 2 + (BACKWARD,) * 3
        for found, (exact, allowed), names in zip(
            attend(check), promises(check), blamed, strict=True
        ):
            error = (found.double().cpu() - exact).abs()
            worst = torch.where(error == 0, 0.0, error / allowed).max().item()
            if not worst <= 1:
                wrong |= dict.fromkeys(names, f"{check}: observed / allowed = {worst:.3g}")
    return wrong


def promises(check: AttentionCheck) -> Iterator[tuple[Tensor, Tensor]]:
    """Output, logsumexp and three gradients in FP64, each with the error that is allowed."""
    q, k, v, grad = check.values()
    scoring, everything = check.scoring(), (slice(0, check.length), slice(0, check.keys))
    product = scoring.scale * (q @ k.mT)
    capped, slope = scoring.cap(product)
    scores = scoring.hide(capped, *everything)
    weights, logsumexp = scoring.softmax(scores)
    magnitude = (
        scoring.scale * (q.abs() @ k.abs().mT).max() + scores[scores.isfinite()].abs().max()
    )
    count = check.head_size + check.value_size + check.GROUP * check.length + check.keys + 16
    relative = 2 * (check.head_size + 4) * UNIT * magnitude + count * UNIT
    output = weights @ v
    yield output, relative * (weights @ v.abs())
    yield logsumexp, relative * (1 + logsumexp.abs())
    difference = grad @ v.mT - (grad * output).sum(-1, keepdim=True)
    sizes = grad.abs() @ v.abs().mT + (grad * output).abs().sum(-1, keepdim=True)
    assert slope is not None, "every check has a cap"
    grad_scores = scoring.scale * weights * difference * slope
    grad_sizes = abs(scoring.scale) * weights * sizes
    yield grad_scores @ k, relative * (grad_sizes @ k.abs())

    def of_keys(left: Tensor, right: Tensor) -> Tensor:
        return (left.mT @ right).sum(1, keepdim=True)

    yield of_keys(grad_scores, q), relative * of_keys(grad_sizes, q.abs())
    yield of_keys(weights, grad), relative * of_keys(weights, grad.abs())


def on_gpu(index: int) -> Attend:
    """Attend through compiled code on a GPU, compiled anew for every check."""
    options = {"fx_graph_cache": False}

    @functools.partial(torch.compile, fullgraph=True, dynamic=False, options=options)
    def forward_and_backward(name: str, grad: Tensor, *call: object) -> tuple[Tensor, ...]:
        results = getattr(torch.ops.heal, name)(*call)
        backward = getattr(torch.ops.heal, f"{name}_backward")
        return (*results, *backward(grad, *call, *results))

    def attend(check: AttentionCheck) -> tuple[Tensor, ...]:
        torch._dynamo.reset()
        grad, *call = (
            x.to(f"cuda:{index}") if isinstance(x, Tensor) else x
            for x in (check.operands()[-1], *check.call())
        )
        return forward_and_backward(check.operator, grad, *call)

    return attend
