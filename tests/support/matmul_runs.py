"""Matrix products that run through generated kernels in the interpreter, against FP64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support import interpreter
from tests.support.fake_cuda import Device, generated_source
from tests.support.template_bounds import template_bound

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in memory: transposed, and with NaN between its rows."""

    transposed: bool
    padding: int

    def lay(self, matrix: Tensor) -> Tensor:
        """The same values in this layout."""
        stored = matrix.mT if self.transposed else matrix
        *lead, rows, columns = stored.shape
        room = torch.full((*lead, rows, columns + self.padding), torch.nan, dtype=matrix.dtype)
        room[..., :columns] = stored
        view = room[..., :columns]
        return view.mT if self.transposed else view


def multiply(a: Tensor, b: Tensor, numerics: str = "heal", capability: int = 90) -> Tensor:
    """`a @ b` as the generated code for a GPU computes it."""
    op = torch.ops.heal.mm if a.dim() == 2 else torch.ops.heal.bmm
    source = generated_source(lambda x, y: (op(x, y, numerics),), [a, b], Device(capability))
    (result,) = interpreter.run(source, a, b)
    return result


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, exponent: int) -> Tensor:
    """Normal numbers times a power of two, with a heavy tail that spans 2^-20 to 2^20."""
    generator = torch.Generator().manual_seed(seed)
    tail = torch.randint(-10, 11, shape, generator=generator)
    scaled = torch.randn(shape, generator=generator).double() * 2.0 ** (exponent + tail.double())
    limit = torch.finfo(dtype).max
    return scaled.clamp(-limit, limit).to(dtype)


def assert_within_bound(
    a: Tensor, b: Tensor, result: Tensor, numerics: str, *, decode: bool | None = None
) -> float:
    """Check every element; the largest observed / bound."""
    exact = a.double() @ b.double()
    bound = template_bound(a, b, numerics, decode=decode)
    # Where FP32 itself may overflow on the way, only the sign of the result is left to compare.
    safe = (a.double().abs() @ b.double().abs()) + bound < LARGEST
    ratio = torch.where(safe, (result.double() - exact).abs() / bound.clamp_min(2.0**-300), 0.0)
    worst = ratio.max().item() if ratio.numel() else 0.0
    assert not torch.isnan(result[safe]).any(), "NaN where the exact result is finite"
    assert worst <= 1, f"observed / bound = {worst:.3f}"
    return worst


capabilities = st.sampled_from([80, 90, 100])
layouts = st.builds(Layout, st.booleans(), st.sampled_from([0, 1, 5, 8]))
sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 100, 129]))


@dataclass(frozen=True)
class Side:
    """One operand, but for its shape."""

    dtype: torch.dtype
    layout: Layout
    exponent: int
    seed: int

    def tensor(self, *shape: int) -> Tensor:
        """The operand."""
        return self.layout.lay(values(shape, self.dtype, self.seed, self.exponent))


def shapes(rows: st.SearchStrategy[int] = sizes) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Shapes of two operands, a third of them batched."""
    leads = st.sampled_from([(), (), (), (), (1,), (3,)])
    return st.builds(
        lambda lead, m, n, k: ((*lead, m, k), (*lead, k, n)), leads, rows, sizes, sizes
    )


exponents = st.sampled_from([0, 0, 0, -90, -40, 40, 90])
sides = st.builds(Side, st.sampled_from(DTYPES), layouts, exponents, st.integers(0, 2**30))
