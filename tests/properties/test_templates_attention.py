"""The generated attention kernels keep their bound, in Triton's interpreter.

What is generated here is what a GPU would run, byte for byte; only the interpreter stands in for
the GPU. Memory that no one wrote is NaN, and so is the scale of whatever a mask hides.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from healpass.lowering import attention
from healpass.lowering.tiles import AttentionTile
from hypothesis import given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from healpass.ops.scores import Scoring
from tests import interpreter
from tests.fake_cuda import Device, always, generated_source
from tests.gpu.attention_bounds import Digits, Exact, exact


@dataclass(frozen=True)
class Problem:
    """An attention to compute: operands in digits and how they are scored."""

    query: Digits
    key: Digits
    value: Digits
    scoring: Scoring

    def call(self) -> list[Any]:
        """Arguments of `heal::integer_attention`."""
        s = self.scoring
        states = (self.query, self.key, self.value)
        digits = [part for x in states for part in (x.planes, x.scale)]
        return [
            *digits, s.attn_mask, s.sinks, s.seed, s.is_causal, s.scale, s.window, s.softcap,
            s.dropout_p, "heal",
        ]  # fmt: skip

    def with_scoring(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, scoring=dataclasses.replace(self.scoring, **changes))

    def part(self, batch: slice = slice(None), keys: slice = slice(None)) -> Problem:
        """Some of the batch and some of the keys."""
        key, value = (Digits(x.planes[batch, :, :, keys], x.scale[batch, :, keys])
                      for x in (self.key, self.value))  # fmt: skip
        mask = self.scoring.attn_mask
        mask = None if mask is None else mask[..., keys]
        query = Digits(self.query.planes[batch], self.query.scale[batch])
        return Problem(query, key, value, dataclasses.replace(self.scoring, attn_mask=mask))


def attend(problem: Problem, capability: int = 90) -> tuple[Tensor, Tensor]:
    """Output and logsumexp as the generated code for a GPU computes them."""
    call = problem.call()
    tensors = [x for x in call if isinstance(x, Tensor)]

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        given_tensors = iter(inputs)
        return torch.ops.heal.integer_attention(
            *(next(given_tensors) if isinstance(x, Tensor) else x for x in call)
        )

    output, logsumexp = interpreter.run(
        generated_source(function, tensors, Device(capability)), *tensors
    )
    return output, logsumexp


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
    parts = (Digits.of(x, kv) for x in (query, key, value))
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


lengths = st.one_of(st.integers(1, 12), st.sampled_from([31, 33, 65]))
key_lengths = st.one_of(st.integers(1, 70), st.sampled_from([127, 129, 300]))
problems = st.fixed_dictionaries({
    "batch": st.sampled_from([1, 1, 2]),
    "heads": st.integers(1, 2),
    "groups": st.integers(1, 3),
    "length": lengths,
    "keys": key_lengths,
    "size": st.sampled_from([1, 3, 16, 64, 80]),
    "value_size": st.sampled_from([1, 5, 16, 40]),
    "kv": st.sampled_from(["int16", "int24"]),
    "seed": st.integers(0, 2**20),
    "exponents": st.sampled_from([(0, 0), (0, 0), (60, 0), (0, 60), (-60, -90), (2, 100)]),
    "mask": st.sampled_from(["none", "none", "bool", "float"]),
    "is_causal": st.booleans(),
    "window": st.sampled_from([None, None, 1, 7, 100]),
    "softcap": st.sampled_from([None, None, 5.0]),
    "sinks": st.booleans(),
    "dropout_p": st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0]),
})  # fmt: skip


def drawn(arguments: dict[str, Any]) -> Problem:
    arguments = dict(arguments)
    kind, seed = arguments.pop("mask"), arguments["seed"]
    heads = arguments["heads"] * arguments["groups"]
    sinks = random((heads,), seed + 3) if arguments.pop("sinks") else None
    mask = mask_of(kind, arguments["length"], arguments["keys"], seed + 4)
    words = torch.tensor([seed * 0x9E3779B97F4A7C1 % 2**62 - 2**61])
    drops = words if arguments["dropout_p"] else None
    return build(**arguments, sinks=sinks, attn_mask=mask, drops=drops)


@settings(max_examples=25)
@given(problems, st.sampled_from([80, 90, 100]))
def test_every_attention_is_within_its_bound(arguments, capability):
    problem = drawn(arguments)
    worst = assert_within_bound(problem, attend(problem, capability))
    target(worst, label="observed / bound")
