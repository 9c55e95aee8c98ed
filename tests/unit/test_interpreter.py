"""The corrections of Triton's interpreter, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as plain

from tests.support import interpreter


def nearest(exact: Fraction) -> float:
    """The FP32 number next to a fraction, ties to even, found without rounding twice."""
    guess = np.float32(float(exact))
    around = [
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    ]
    return float(
        min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))
    )


def handles(*values: torch.Tensor) -> list[plain.TensorHandle]:
    return [plain.TensorHandle(value.numpy(), tl.float32) for value in values]


def operands() -> list[torch.Tensor]:
    """Random numbers, and x y + z beside a tie of FP32 by less than FP64 shows."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(400, generator=generator) for _ in range(3))
    x[0], y[0], z[0] = 1 + 2**-12, 1 + 2**-12, 2.0**-60
    x[1], y[1], z[1] = 1 + 2**-12, 1 + 2**-12, -(2.0**-60)
    return [x, y, z]


def rounded_once(fused: torch.Tensor, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> bool:
    rows = zip(*(t.tolist() for t in (fused, x, y, z)), strict=True)
    return all(f == nearest(Fraction(a) * Fraction(b) + Fraction(c)) for f, a, b, c in rows)


def test_a_multiply_add_rounds_once():
    values = operands()
    fused = interpreter._fma(None, *handles(*values)).data
    assert rounded_once(torch.from_numpy(fused), *values)


def test_a_multiply_add_that_rounds_twice_is_noticed():
    x, y, z = operands()
    assert not rounded_once(x * y + z, x, y, z)
    assert not rounded_once((x.double() * y.double() + z.double()).float(), x, y, z)


def test_a_multiply_add_of_another_dtype_is_refused():
    half = plain.TensorHandle(np.ones(1, np.float16), tl.float16)
    with pytest.raises(TypeError, match="rounds a multiply-add twice"):
        interpreter._fma(None, half, half, half)


@triton.jit
def larger(X, Y, OUT):  # noqa: N803
    tl.store(OUT, tl.maximum(tl.load(X), tl.load(Y)))
    tl.store(OUT + 1, tl.minimum(tl.load(X), tl.load(Y)))


def test_the_maximum_ignores_nan_as_a_gpu_does():
    out = torch.zeros(2)
    with interpreter.interpreted(larger) as kernel:
        kernel[(1,)](torch.tensor([torch.nan]), torch.tensor([3.0]), out)
    assert out.tolist() == [3.0, 3.0]


@triton.jit
def cast(X, OUT):  # noqa: N803
    tl.store(OUT, tl.load(X).to(tl.float16))


def test_a_cast_of_bf16_takes_its_value_and_not_its_bits():
    out = torch.zeros(1, dtype=torch.float16)
    with interpreter.interpreted(cast) as kernel:
        kernel[(1,)](torch.tensor([1.5], dtype=torch.bfloat16), out)
    assert out.item() == 1.5
