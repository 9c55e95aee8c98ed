"""Two ways to compare a rewritten graph with torch: bit for bit, or within a bound from FP64.

Bits: where operands are small integers every sum and product fits 8 bits, so 16-bit and FP32
arithmetic agree and the rewritten graph must give torch's own bits; what is left to go wrong is
who writes where, who sees which dtype, and which dtype comes out.

Accuracy: the rewritten graph and torch's FP32 run of the function are both FP32 evaluations,
which differ in their order of summation only: `|heal - exact| <= 2 |fp32 - exact| + 4u |exact|` in
the maximum norm. A single rounding to BF16 is 2^16 u and cannot hide in that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from healpass.config import HealConfig
from tests.support.rewriting import Rewritten, to

U = 2.0**-24
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def chance(count: int) -> float:
    """How far the RMS of `count` independent errors may lie above that of as many like them.

    The RMS of n normal numbers has the relative standard deviation 1 / sqrt(2n), the ratio of two
    sqrt(2) times that; three of them.
    """
    return 1 + 3 / math.sqrt(count)


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-2, 3, shape, generator=generator).to(BF16)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(BF16)


def flat(tree: Any) -> list[Tensor]:
    return [
        leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)
    ]


def same_bits(function: Callable[..., Any], operands: Any) -> Rewritten:
    """Assert that results and operands after the call are those of torch, bit for bit."""
    ours, theirs = copy.deepcopy(operands), copy.deepcopy(operands)
    expected = function(*theirs)
    compiled = Rewritten(function, HealConfig(kv="fp32"))
    results = compiled(*ours)
    for result, wanted in zip(flat([results, ours]), flat([expected, theirs]), strict=True):
        assert result.dtype == wanted.dtype
        assert torch.equal(result, wanted), (
            f"{result} instead of {wanted}\n{compiled.graphs[-1].code}"
        )
    return compiled


def as_accurate_as_fp32(function: Callable[..., Any], operands: Any) -> Rewritten:
    """Assert the second bound above; print observed/bound."""
    compiled = Rewritten(function, HealConfig(outputs="fp32", kv="fp32"))
    results = flat(compiled(*copy.deepcopy(operands)))
    single, exact = (flat(function(*to(operands, dtype))) for dtype in (FP32, torch.float64))
    for result, wide, reference in zip(results, single, exact, strict=True):
        scale = float(reference.abs().max())
        budget = 2 * float((wide - reference).abs().max()) + 4 * U * scale
        error = float((result - reference).abs().max())
        print(f"observed/bound {error / (budget or 1):.3f}")
        assert result.dtype == FP32
        assert error <= budget
    return compiled
