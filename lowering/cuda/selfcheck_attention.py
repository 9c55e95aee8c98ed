"""The attention templates' part of `selfcheck`: small problems, and what they may be off by.

A result has to be as close to FP64 as attention in FP32 would have to be. With u = 2^-24 and D the
largest scale * |q| . |k| and score: a score is off by (E + 4) u D, a weight by twice that and by
(S + 8) u of itself, a sum of n weighted values by n u. Gradients go through the longest chain of
sums: over E, EV, S and all rows. May import `checking`, and the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from healpass.lowering.cuda.checking import each
from healpass.ops.attention.quantize import integers
from healpass.ops.attention.scoring import Scoring

UNIT = 2.0**-24


@dataclass(frozen=True)
class AttentionCheck:
    """A small attention, or its gradients: three query heads per key head."""

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

    @property
    def backward(self) -> bool:
        """Whether it is of the gradients."""
        return self.templates == BACKWARD

    def call(self) -> tuple[Any, ...]:
        """The arguments of the attention."""
        return (*self.operands()[:-1], *self.scoring().arguments, "heal")

    def request(self) -> tuple[str, tuple[Any, ...]]:
        """Name and arguments of the operator; gradients are of what the reference attends."""
        if not self.backward:
            return self.operator, self.call()
        results = getattr(torch.ops.heal, self.operator)(*self.call())
        return f"{self.operator}_backward", (self.operands()[-1], *self.call(), *results)


#: Output and logsumexp of a check, or the gradients of Q, K and V.
Attend = Callable[[AttentionCheck], Sequence[Tensor]]
FORWARD, MERGE = "attention", "attention_merge"
BACKWARD = ("attention_backward_query", "attention_backward_key")


def checks() -> Iterator[AttentionCheck]:
    """Both families and formats, and gradients; few keys, so a lost piece is noticed."""
    for check in _forward():
        yield check
        yield replace(check, templates=BACKWARD)


def _forward() -> Iterator[AttentionCheck]:
    for kv in ("int16", "int24", "fp32"):
        yield AttentionCheck((FORWARD,), kv, length=20, keys=20, is_causal=True)
        yield AttentionCheck((FORWARD, MERGE), kv, length=2, keys=20)
    yield AttentionCheck((FORWARD, MERGE), "int16", length=1, keys=600)
    yield AttentionCheck((FORWARD,), "int16", length=70, keys=70, head_size=128, value_size=128)
    yield AttentionCheck((FORWARD,), "int16", length=20, keys=40, head_size=256, value_size=256)


def faults(check: AttentionCheck, results: Sequence[Tensor]) -> dict[str, str]:
    """What is wrong with the results of a check, by template."""
    wrong: dict[str, str] = {}
    for found, (exact, allowed) in zip(results, promises(check), strict=True):
        error = (found.double().cpu() - exact).abs()
        worst = torch.where(error == 0, 0.0, error / allowed).max().item()
        if not worst <= 1:
            said = f"{check}: observed / allowed = {worst:.3g}"
            wrong |= dict.fromkeys(check.templates, said)
    return wrong


def examine(attend: Attend, chosen: Iterable[AttentionCheck] | None = None) -> dict[str, str]:
    """Run every check, or the chosen ones; what is wrong, by template."""
    return each(checks() if chosen is None else chosen, attend, faults)


def promises(check: AttentionCheck) -> Iterator[tuple[Tensor, Tensor]]:
    """The results of a check in FP64, each with the error that is allowed."""
    forward, backward = slice(0, 2), slice(2, 5)
    yield from [*_promises(check)][backward if check.backward else forward]


def _promises(check: AttentionCheck) -> Iterator[tuple[Tensor, Tensor]]:
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


def together(device: str) -> Callable[[Sequence[AttentionCheck]], Sequence[Sequence[Tensor]]]:
    """Run checks through compiled code on a device, all in one graph."""

    def attend(names: Sequence[str], *calls: Sequence[Any]) -> list[Any]:
        return [
            getattr(torch.ops.heal, name)(*call) for name, call in zip(names, calls, strict=True)
        ]

    def run(chosen: Sequence[AttentionCheck]) -> Sequence[Sequence[Tensor]]:
        from healpass import lowering

        lowering.register()
        torch._dynamo.reset()
        names, calls = zip(*(check.request() for check in chosen), strict=True)
        options: dict[str, Any] = {
            "fx_graph_cache": False
        }  # Inductor's cache does not know our sources
        compiled = torch.compile(attend, fullgraph=True, dynamic=False, options=options)
        moved = [[x.to(device) if isinstance(x, Tensor) else x for x in call] for call in calls]
        results: list[Any] = compiled(names, *moved)
        return results

    return run
