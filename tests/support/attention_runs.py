"""Attention problems that run through generated kernels in the interpreter, against FP64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.ops.attention.scoring import Scoring
from tests.support import interpreter
from tests.support.attention_bounds import Digits, Exact, Floats, Operand, exact, gradients
from tests.support.fake_cuda import Device, generated_source


@dataclass(frozen=True)
class Problem:
    """An attention to compute: operands, in digits or as stored, and how they are scored."""

    query: Operand
    key: Operand
    value: Operand
    scoring: Scoring
    numerics: str = "heal"

    @property
    def name(self) -> str:
        """Of the operator."""
        return "integer_attention" if self.query.digits else "attention"

    def call(self) -> list[Any]:
        """Arguments of the operator."""
        states = (self.query, self.key, self.value)
        operands = [part for x in states for part in x.arguments]
        return [*operands, *self.scoring.arguments, self.numerics]

    def with_scoring(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, scoring=dataclasses.replace(self.scoring, **changes))

    def part(self, batch: slice = slice(None), keys: slice = slice(None)) -> Problem:
        """Some of the batch and some of the keys."""
        key, value = (x.part(batch, keys) for x in (self.key, self.value))
        mask = self.scoring.attn_mask
        mask = None if mask is None else mask[..., keys]
        scoring = dataclasses.replace(self.scoring, attn_mask=mask)
        return Problem(self.query.part(batch), key, value, scoring, self.numerics)


Change = Callable[[str], str]


def run(
    operator: Any, call: list[Any], capability: int = 90, change: Change | None = None
) -> tuple[Tensor, ...]:
    """An operator as the generated code for a GPU computes it; `change` edits that code first."""
    tensors = [x for x in call if isinstance(x, Tensor)]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        rest = iter(inputs)
        return operator(*(next(rest) if isinstance(x, Tensor) else x for x in call))

    source = generated_source(function, tensors, Device(capability))
    changed = source if change is None else change(source)
    assert change is None or changed != source, "the code to be broken is not there"
    return interpreter.run(changed, *tensors)


def attend(
    problem: Problem, capability: int = 90, change: Change | None = None
) -> tuple[Tensor, ...]:
    """Output and logsumexp."""
    return run(getattr(torch.ops.heal, problem.name), problem.call(), capability, change)


def differentiate(
    problem: Problem,
    grad: Tensor,
    capability: int = 90,
    change: Change | None = None,
    forward: Problem | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of Q, K and V, from `forward`'s output and logsumexp, right to FP32."""
    of = problem if forward is None else forward
    reference = exact(of.query, of.key, of.value, of.scoring)
    call = [grad, *problem.call(), reference.output.float(), reference.logsumexp.float()]
    operator = getattr(torch.ops.heal, f"{problem.name}_backward")
    return run(operator, call, capability, change)


def random(shape: tuple[int, ...], seed: int, exponent: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tail = torch.randint(-4, 5, (*shape[:-1], 1), generator=generator)
    return torch.randn(shape, generator=generator) * 2.0**tail * 2.0**exponent


def build(
    batch: int = 1, heads: int = 2, groups: int = 2, length: int = 5, keys: int = 70,
    size: int = 64, value_size: int = 64, kv: str = "int16", seed: int = 0,
    exponents: tuple[int, int] = (0, 0), drops: Tensor | None = None, **scoring: Any,
) -> Problem:  # fmt: skip
    query = random((batch, heads * groups, length, size), seed, exponents[0])
    key = random((batch, heads, keys, size), seed + 1, -exponents[0])
    value = random((batch, heads, keys, value_size), seed + 2, exponents[1])
    parts = (Floats(x) if kv == "fp32" else Digits.of(x, kv) for x in (query, key, value))
    return Problem(*parts, Scoring(**{"scale": size**-0.5, "seed": drops, **scoring}))


def assert_within_bound(problem: Problem, result: tuple[Tensor, Tensor]) -> float:
    """Check every element; the largest observed / bound."""
    reference: Exact = exact(problem.query, problem.key, problem.value, problem.scoring)
    worst = 0.0
    for found, wanted, bound in (
        (result[0], reference.output, reference.bound),
        (result[1], reference.logsumexp, reference.logsumexp_bound),
    ):
        assert not found.isnan().any(), "NaN from finite inputs"
        same = found.double() == wanted  # -inf for rows that see nothing
        ratio = torch.where(same, 0.0, (found.double() - wanted).abs() / bound)
        ratio = ratio.nan_to_num(math.inf)  # a bound that is no number bounds nothing
        worst = max(worst, ratio.max().item() if ratio.numel() else 0.0)
    assert worst <= 1, f"observed / bound = {worst:.3f}"
    return worst


def mask_of(kind: str, length: int, keys: int, seed: int) -> Tensor | None:
    """A mask with whole rows off."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(length, keys, generator=generator)
    if kind == "bool":
        return (scores > 0.3) & (torch.arange(length) % 3 != 1)[:, None]
    if kind == "float":
        off = (torch.arange(length) % 3 == 1)[:, None] | (scores > 1.5)
        return (3 * scores).masked_fill(off, -math.inf)
    return None


def assert_gradients_within_bound(problem: Problem, grad: Tensor, found: Any) -> float:
    """Check every element of the three gradients; the largest observed / bound."""
    worst = 0.0
    wanted = gradients(problem.query, problem.key, problem.value, problem.scoring, grad)
    for result, gradient in zip(found, wanted, strict=True):
        assert not result.isnan().any(), "NaN from finite inputs"
        ratio = (result.double() - gradient.exact).abs() / gradient.bound
        worst = max(worst, ratio.nan_to_num(math.inf).max().item())
    assert worst <= 1, f"observed / bound = {worst:.3f}"
    return worst


FAMILIES = {"decode": 3, "prefill": 40}


def family(name: str, **arguments: Any) -> Problem:
    """A problem of either family with more keys than a chunk has."""
    return build(**{"heads": 1, "length": FAMILIES[name], "keys": 300, "batch": 3, **arguments})


def without_products_of(piece: str) -> Change:
    """Leave out every tensor-core product in which a piece takes part."""

    def change(source: str) -> str:
        lines = source.splitlines(keepends=True)
        return "".join(line for line in lines if "tl.dot(" not in line or piece not in line)

    return change
