"""What `heal::digit_sums` carries on a GPU, in the interpreter: zero differing bits.

Attention's gradient is opened into a graph: products of digits by templates, and between them
bit-reproducible steps that Inductor compiles.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from healpass.arithmetic.digits import BASE_BITS
from healpass.lowering.cuda import exact_matmul
from healpass.lowering.cuda.exact_tiles import ExactTile
from tests.support import interpreter
from tests.support.bits import differing
from tests.support.exact_gpu import Attended, run, source
from tests.support.fake_cuda import always

heal = torch.ops.heal

# --------------------------------------------------------------------------------- integer sums


def planes(count: int, *size: int, seed: int = 0, smallest: int = -128) -> list[Tensor]:
    """INT8 digits of every value, the largest in the first row."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randint(smallest, 128, size, generator=generator) for _ in range(count)]
    for plane in found:
        plane[:, :1] = -128
    return [plane.to(torch.int8) for plane in found]


def summed(left: list[Tensor], right: list[Tensor], cut: int, capability: int = 90) -> Tensor:
    """`heal::digit_sums` as the generated code for a GPU computes it."""
    count = len(left)

    def sums(*operands: Tensor) -> tuple[Tensor]:
        return (heal.digit_sums(operands[:count], operands[count:], cut),)

    return run(sums, [*left, *right], capability)[0]


def in_int64(left: list[Tensor], right: list[Tensor], cut: int) -> Tensor:
    """The definition: wide integers, one pair after the other."""
    return sum(
        (x.long() @ y.long()) << (BASE_BITS * (i + j - cut))
        for i, x in enumerate(left)
        for j, y in enumerate(right)
        if i + j >= cut
    )


sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 129]))


@settings(max_examples=8)
@given(
    st.sampled_from([1, 3]), sizes, sizes, sizes,
    st.sampled_from([(2, 2, 0), (3, 3, 0), (3, 2, 1)]), st.booleans(),
    st.sampled_from([80, 90, 103]), st.integers(0, 2**16),
)  # fmt: skip
def test_sums_of_digits_are_those_of_wide_integers(batch, m, n, k, plan, turned, capability, seed):
    left_digits, right_digits, cut = plan
    left = planes(left_digits, batch, m, k, seed=seed)
    right = planes(right_digits, batch, *((n, k) if turned else (k, n)), seed=seed + 1)
    right = [plane.mT for plane in right] if turned else right
    wanted = in_int64(left, right, cut)
    assert differing(heal.digit_sums(left, right, cut), wanted) == 0
    assert differing(summed(left, right, cut, capability), wanted) == 0


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0)])
def test_empty_sums_are_zero(shape):
    batch, m, n, k = shape
    found = summed(planes(2, batch, m, k), planes(2, batch, k, n), 0)
    assert torch.equal(found, torch.zeros(batch, m, n, dtype=torch.int64))


def test_tiles_and_spans_leave_sums_alone(monkeypatch):
    left, right = planes(3, 2, 40, 200), planes(3, 2, 200, 33)
    wanted = in_int64(left, right, 0)
    monkeypatch.setattr(exact_matmul, "terms", always(64))
    for tile in (ExactTile(64, 32, 64, 4, 3), ExactTile(128, 64, 64, 8, 3)):
        monkeypatch.setattr(exact_matmul, "exact_tiles", always([tile]))
        assert differing(summed(left, right, 0), wanted) == 0


def test_one_span_over_the_budget_shows(monkeypatch):
    """The inverse: an FP32 level that adds more than 2^24 holds rounds."""
    left, right = planes(3, 1, 40, 2200, smallest=64), planes(3, 1, 2200, 33, smallest=64)
    wanted = in_int64(left, right, 0)
    assert differing(summed(left, right, 0, 103), wanted) == 0
    monkeypatch.setattr(exact_matmul, "terms", always(1 << 20))
    assert differing(summed(left, right, 0, 103), wanted) > 0


# --------------------------------------------------------------------------------- weighted sums


@pytest.mark.parametrize(
    ("dtype", "numerics", "capability"),
    [(torch.float32, "exact5", 90), (torch.bfloat16, "exact8", 103)],
)
def test_a_weighted_sum_has_the_bits_of_its_reference(dtype, numerics, capability):
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(2, 3, 9, 37, generator=generator).softmax(-1)
    weights[..., ::5] = 0.0
    values = torch.randn(2, 3, 37, 24, generator=generator)
    values *= 2.0 ** torch.randint(-30, 30, (37, 1), generator=generator)
    weights[0, 0, 3, 1], values[1, 2, 7, 5], values[0, 1, 5, 3] = math.nan, -math.inf, math.inf

    def weigh(p: Tensor, v: Tensor) -> tuple[Tensor]:
        return (heal.weighted_sum(p, v, numerics),)

    tensors = [weights, values.to(dtype)]
    text = source(weigh, tensors, capability)
    assert "heal.weighted_sum" not in text, "it was left to its reference implementation"
    assert differing(interpreter.run(text, *tensors), weigh(*tensors)) == 0


# -------------------------------------------------------------------------- attention's gradient


def states(length: int, keys: int, group: int = 1, value_size: int = 16) -> list[Tensor]:
    """What comes in, Q, K and V; tokens differ by many powers of 2."""
    generator = torch.Generator().manual_seed(length + keys)
    sizes = [(group, length, value_size), (group, length, 16), (1, keys, 16)]
    sizes += [(1, keys, value_size)]
    grad, q, k, v = (torch.randn(2, *size, generator=generator) for size in sizes)
    tail = torch.randint(-20, 20, (2, 1, keys, 1), generator=generator)
    return [grad * 2.0**-12, q * 3, k, v * 2.0**tail]


@pytest.mark.parametrize(
    ("length", "keys", "group", "attended", "capability"),
    [
        (9, 9, 3, Attended(is_causal=True, window=4), 90),
        (5, 21, 2, Attended(kv="int24", scale=-0.3, numerics="exact8"), 103),
        pytest.param(70, 70, 2, Attended(is_causal=True), 80, marks=pytest.mark.deep),
        pytest.param(1, 5, 2, Attended(), 90, marks=pytest.mark.deep),
    ],
)
def test_the_gradient_of_attention_has_the_bits_of_its_reference(
    length, keys, group, attended, capability
):
    tensors = states(length, keys, group, value_size=24)
    text = source(attended, tensors, capability)
    assert "integer_attention_backward" not in text, "it was left to its reference implementation"
    assert differing(interpreter.run(text, *tensors), attended(*tensors)) == 0


@pytest.mark.parametrize("boolean", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_masks_and_what_is_not_finite_in_the_gradient(boolean):
    grad, q, k, v = states(9, 21)
    k[0, 0, 5, 2], v[1, 0, 7, 0], grad[0, 0, 3, 1] = math.nan, math.inf, -math.inf
    mask = torch.randn(9, 21, generator=torch.Generator().manual_seed(1))
    mask = mask.masked_fill(mask > 1, -math.inf)
    mask[0] = -math.inf
    tensors = [grad, q, k, v, mask > 0 if boolean else mask]
    wanted = Attended()(*tensors)
    assert any(gradient.isnan().any() for gradient in wanted)
    assert any(gradient.isfinite().any() for gradient in wanted)
    assert differing(run(Attended(), tensors), wanted) == 0


@pytest.mark.parametrize(("capability", "how"), [(75, "exact5"), (90, "exact5:h100")])
def test_a_gradient_that_has_no_kernel_runs_its_reference(capability, how):
    text = source(Attended(numerics=how), states(9, 21), capability)
    assert "torch.ops.heal.integer_attention_backward.default" in text
