"""Bit patterns: how the tests of exact arithmetic compare, poison and compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import decomposition
from torch._inductor.compile_fx import compile_fx

from healpass import lowering
from healpass.backend import PINNED_SETTINGS
from healpass.lowering.cpu import exact as exact_cpu
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.register import DECOMPOSITIONS
from tests.support.against_torch import flat

SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38]
    + [-3.4028234663852886e38, float("inf"), float("-inf"), float("nan"), -float("nan")]
)


def differing(ours: Any, theirs: Any) -> int:
    """How many FP32 or integer elements of two trees differ in a bit."""
    total = 0
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point():
            width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            a, b = a.detach().contiguous().view(width), b.detach().contiguous().view(width)
        total += int((a != b).sum())
    return total


def ulp(exact: Tensor) -> Tensor:
    """The distance of FP32 numbers around FP64 `exact`; that of subnormals below 2^-126."""
    exponent = (exact.abs().view(torch.int64) >> fp64.FRACTION_BITS) - fp64.BIAS
    return fp64.two_to(exponent.clamp(-126, 127) - 23)


def assert_rounded_once(
    found: Tensor, exact: Tensor, relative: float, absolute: Tensor | float = 0.0
) -> None:
    """Check FP32 results against FP64 ones; those that FP32 has no number for have to be equal.

    Args:
        found: FP32.
        exact: FP64, of the same shape.
        relative: The error before the rounding to FP32, of the result itself.
        absolute: The error before it that does not shrink with the result.
    """
    assert found.shape == exact.shape
    regular = exact.abs() < 2.0**128 - 2.0**103  # from there on FP32 rounds to infinity
    special = [x[~regular].nan_to_num(nan=7.0) for x in (found, exact.float())]
    assert torch.equal(*special)
    bound = fp64.places(relative) * ulp(exact) + absolute
    ratio = ((found.double() - exact).abs() / bound)[regular]
    worst = float(ratio.max()) if ratio.numel() else 0.0
    print(f"observed/bound {worst:.4f}")
    assert worst <= 1


def any_floats(count: int, seed: int = 0) -> Tensor:
    """FP32 numbers of every exponent and sign, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator)
    return torch.cat([SPECIAL, bits.to(torch.int32).view(torch.float32)])


def ordinary(count: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """What activations look like."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * scale


def compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`function` through Inductor as `precision="exact"` compiles, its operators decomposed."""
    lowering.register()  # some stay operators, and have kernels
    patches = {**PINNED_SETTINGS, **settings}
    table = {**decomposition.select_decomp_table(), **DECOMPOSITIONS, **exact_cpu.DECOMPOSITIONS}

    def backend(graph_module: Any, inputs: list[Any]) -> Any:
        return compile_fx(graph_module, inputs, config_patches=patches, decompositions=table)

    return torch.compile(function, backend=backend, dynamic=False)
