"""The `numerics` argument of the `heal::` operators: which arithmetic, whose adders.

A short text, so that it can stand in an operator's schema and in a cache key: `heal`, `layercast`,
`exact5` (by 5 products of digits), `heal:a100` (as an A100's tensor cores would add),
`heal:a100:3` or `heal::3` (in another order of summation, seed 3), `heal:::m_invariant` (one order
of summation for every number of rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from healpass.errors import OperandError
from healpass.ops.products.exact import SCHEMES, Adders, exact_matmul
from healpass.ops.products.ieee import ieee_fp32, mm_fp32
from healpass.tensorcore.matmul import Accumulation, heal_matmul
from healpass.tensorcore.rules import Schedule
from healpass.tensorcore.simulate import simulate_matmul

#: precision="exact" with `exact_products` behind the name -> that number.
EXACT = {f"exact{products}": products for products in SCHEMES}
PRECISIONS = ("heal", "layercast", *EXACT)
GENERATIONS = ("v100", "a100", "h100", "b200")
M_INVARIANT = "m_invariant"


@dataclass(frozen=True)
class Numerics:
    """The parsed argument.

    Attributes:
        precision: `heal`, `layercast`, or `exact` and its number of products.
        simulate: A GPU generation whose additions are imitated, or None for FP32 arithmetic.
        order: Seed of the order of summation; 0 is the natural one.
        m_invariant: A row of a CUDA matmul has the same bits for every number of rows.
    """

    precision: str
    simulate: str | None = None
    order: int = 0
    m_invariant: bool = False

    def __str__(self) -> str:
        """The text that `parse` reads."""
        last = M_INVARIANT if self.m_invariant else ""
        text = f"{self.precision}:{self.simulate or ''}:{self.order or ''}:{last}"
        return text.rstrip(":")

    @classmethod
    def parse(cls, text: str) -> Numerics:
        """Read the text.

        Raises:
            ValueError: It is not `precision[:generation[:order[:m_invariant]]]` with known names.
        """
        return _parse(text)

    @property
    def plain(self) -> bool:
        """Whether lowerings may implement it: nothing is simulated or reordered."""
        return self.simulate is None and self.order == 0

    @property
    def products(self) -> int | None:
        """Number of digit products of an exact precision, else None."""
        return EXACT.get(self.precision)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b`, `[..., M, K]` by `[..., K, N]`, in FP32.

        Unsimulated this is FP32 arithmetic on the upcast operands: bound K * 2^-24 * (|a| @ |b|).
        Simulated `heal` multiplies 16-bit pieces (`tensorcore.matmul`), simulated `layercast` runs
        a chain of FP32 multiply-adds; `arithmetic.bounds` has their bounds. Exact precisions have
        the same bits in any case (`products.exact`).
        """
        if self.products is not None:
            if self.order and self.simulate is None:
                a, b = _shuffled(a, b, self.order)
            return exact_matmul(a, b, self.products, Adders(self.simulate, self.order))
        if self.simulate is None:
            return mm_fp32(*(_shuffled(a, b, self.order) if self.order else (a, b)))
        with ieee_fp32(a.device.type):
            if self.precision == "heal":
                return heal_matmul(a, b, Accumulation(self.simulate, order=self.order))
            return _fma_chain(a, b, self.order)


@cache
def _parse(text: str) -> Numerics:
    precision, simulate, order, last = (*text.split(":"), "", "", "")[:4]
    known = precision in PRECISIONS and simulate in ("", *GENERATIONS)
    known = known and last in ("", M_INVARIANT) and text.count(":") <= 3
    if not known or (order and not order.isdecimal()):
        raise OperandError(
            f"numerics={text!r} is not one of {', '.join(PRECISIONS)}, with ':' and one of "
            f"{', '.join(GENERATIONS)} and ':' and a seed behind it if wanted, as 'heal:a100:3', "
            f"and ':{M_INVARIANT}' last of all."
        )
    return Numerics(precision, simulate or None, int(order or 0), bool(last))


def _shuffled(a: Tensor, b: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The operands over a permutation of K: the same products in another order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(a.shape[-1], generator=generator).to(a.device)
    return a.index_select(-1, order), b.index_select(-2, order)


def _fma_chain(a: Tensor, b: Tensor, order: int) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left = a.to(torch.float32).expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
    right = b.to(torch.float32).expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    schedule = Schedule(promote_every=None, order=order)
    result = left.new_empty(left.shape[0], a.shape[-2], b.shape[-1])
    for index in range(left.shape[0]):
        result[index] = simulate_matmul([left[index]], [right[index]], "sgemm", schedule)
    return result.reshape(*batch, a.shape[-2], b.shape[-1])
