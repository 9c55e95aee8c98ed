"""What the property tests draw: operands of every magnitude, crest, sparsity and sign pattern.

A drawn case is a small frozen record; its tensors are made from a seed, so that a failure prints
in one line and shrinks in the parameters that matter.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

GENERATIONS = ("v100", "a100", "h100", "b200")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Data:
    """How one operand is filled.

    Attributes:
        log10: Decimal exponent of its magnitude.
        crest: Decimal exponent of what a few elements are multiplied by.
        zeros: Share of zeros.
        sign: `random`, `positive`, or `cancel`: neighbours of opposite sign and nearly equal size.
        heavy: Whether magnitudes have a heavy tail (a Student t with 1.5 degrees of freedom).
    """

    log10: int
    crest: int
    zeros: float
    sign: str
    heavy: bool


FP32_RANGE = st.integers(-38, 38)


def data(log10: st.SearchStrategy[int] = FP32_RANGE) -> st.SearchStrategy[Data]:
    """Fillings over the whole range of FP32."""
    return st.builds(
        Data,
        log10=log10,
        crest=st.integers(0, 6),
        zeros=st.sampled_from([0.0, 0.0, 0.3, 0.9]),
        sign=st.sampled_from(["random", "positive", "cancel"]),
        heavy=st.booleans(),
    )


def fill(shape: tuple[int, ...], how: Data, dtype: torch.dtype, seed: int, dim: int) -> Tensor:
    """A tensor in `dtype`, finite; `dim` is the reduced dimension, along which `cancel` pairs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if how.heavy:
        x = x / torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(1e-9) ** (
            2 / 3
        )
    if how.sign == "positive":
        x = x.abs()
    if how.sign == "cancel" and shape[dim] > 1:
        half = shape[dim] // 2
        x.narrow(dim, half, half).copy_(-x.narrow(dim, 0, half) * (1 + 1e-6))
    chosen = torch.rand(shape, generator=generator)
    x = torch.where(chosen < 0.05, x * 10.0**how.crest, x) * 10.0**how.log10
    x = torch.where(torch.rand(shape, generator=generator) < how.zeros, 0.0, x)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


@dataclass(frozen=True)
class Product:
    """A matmul to be checked: shapes, formats, fillings, and who adds in which order."""

    m: int
    k: int
    n: int
    left: str
    right: str
    a: Data
    b: Data
    rule: str
    order: int
    split_k: int
    promote_every: int | str | None
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor]:
        """`[M, K]` and `[K, N]`."""
        a = fill((self.m, self.k), self.a, DTYPES[self.left], self.seed, 1)
        return a, fill((self.k, self.n), self.b, DTYPES[self.right], self.seed + 1, 0)


def products(
    rules: tuple[str, ...] = (*GENERATIONS, "fp32", "sgemm"),
    log10: st.SearchStrategy[int] = FP32_RANGE,
) -> st.SearchStrategy[Product]:
    """Matmuls of all formats; long enough for several promotions, small enough for thousands."""
    return st.builds(
        Product,
        m=st.integers(1, 5),
        k=st.integers(1, 300),
        n=st.integers(1, 5),
        left=st.sampled_from(["fp32", "fp32", "bf16", "fp16"]),
        right=st.sampled_from(["bf16", "fp16", "fp32"]),
        a=data(log10),
        b=data(log10),
        rule=st.sampled_from(rules),
        order=st.integers(0, 5),
        split_k=st.integers(1, 4),
        promote_every=st.sampled_from(["rule", "rule", 16, 64, 128, None]),
        seed=st.integers(0, 2**16),
    )
