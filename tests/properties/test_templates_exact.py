"""Exact products as a GPU runs them: zero differing bits against their reference on CPU.

The generated code runs in Triton's interpreter, which adds INT8 products exactly and rounds FP16
products to FP32 once per dot. Padding is NaN, so a read past the end shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from healpass.arithmetic.digits import DIGIT_MAX, FP32_ACCUMULATOR, INT32_ACCUMULATOR
from healpass.backend import PINNED_SETTINGS
from healpass.lowering.cuda import exact_matmul
from healpass.lowering.cuda.exact_tiles import ExactTile
from healpass.ops.products.exact import SCHEMES
from healpass.ops.products.exact import exact_matmul as reference
from healpass.ops.products.numerics import Numerics
from tests.support import interpreter
from tests.support.bits import any_floats, differing
from tests.support.exact_gpu import laid, multiply, run, source
from tests.support.fake_cuda import always, generated_source
from tests.support.strategies import data, fill

heal = torch.ops.heal
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Side:
    """One operand, but for its shape."""

    dtype: torch.dtype
    how: object
    transposed: bool
    padding: int
    seed: int

    def tensor(self, shape: tuple[int, ...], dim: int) -> Tensor:
        """The operand; `dim` is the one that is summed over."""
        values = fill(shape, self.how, self.dtype, self.seed, dim)
        return laid(values, transposed=self.transposed, padding=self.padding)


sides = st.builds(
    Side,
    st.sampled_from([FP32, BF16, FP16]),
    data(),
    st.booleans(),
    st.sampled_from([0, 1, 16]),
    st.integers(0, 2**16),
)
sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 96, 129]))
leads = st.sampled_from([(), (), (), (3,)])
numerics = st.sampled_from(["exact5", "exact5", "exact3", "exact6", "exact8"])
#: 103 takes digits through the tensor core in FP16.
capabilities = st.sampled_from([80, 90, 103])


def differ(a: Tensor, b: Tensor, numerics: str = "exact5", capability: int = 90) -> int:
    """How many elements of a product differ in a bit from the operator's reference."""
    wanted = reference(a, b, Numerics.parse(numerics).products)
    return differing(multiply(a, b, numerics, capability), wanted)


@settings(max_examples=12)
@given(leads, sizes, sizes, sizes, sides, sides, numerics, capabilities)
def test_every_product_has_the_bits_of_its_reference(lead, m, n, k, left, right, how, capability):
    a, b = left.tensor((*lead, m, k), -1), right.tensor((*lead, k, n), -2)
    assert differ(a, b, how, capability) == 0


@settings(max_examples=6)
@given(
    st.integers(0, 2**16), st.sampled_from([2, 40]), st.sampled_from([FP32, BF16]), st.booleans()
)
def test_infinities_nan_and_the_ends_of_fp32_are_those_of_the_reference(seed, m, dtype, in_weight):
    a, b = torch.randn(m, 70, generator=torch.Generator().manual_seed(seed)), torch.ones(70, 20)
    b[:, ::3] = 2.0**-140
    spoiled = b if in_weight else a
    spoiled.view(-1)[: any_floats(20, seed).numel()] = any_floats(20, seed)
    assert differ(a, b.to(dtype)) == 0


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (40, 5, 0)])
def test_empty_products_are_zero(shape):
    m, n, k = shape
    assert torch.equal(multiply(torch.ones(m, k), torch.ones(k, n)), torch.zeros(m, n))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 80), (40, 1, 64), (1, 96, 1)])
def test_single_rows_columns_and_terms(shape):
    m, n, k = shape
    assert differ(torch.full((m, k), 1 / 3), torch.full((k, n), -0.7, dtype=BF16)) == 0


def test_a_row_does_not_depend_on_the_number_of_rows():
    """Decode cuts the weight as it reads it, prefill before; both are exact."""
    a, b = operands(140, 70, 160)
    whole = multiply(a, b)
    for count in (1, 16, 33):
        assert differing(multiply(a[:count], b), whole[:count]) == 0


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """FP32 activations and a BF16 weight, stored as a linear layer has it."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, k, generator=generator).to(BF16)
    return torch.randn(m, k, generator=generator) * 100, weight.t()


TILES = (
    ExactTile(128, 64, 64, 8, 4),
    ExactTile(64, 128, 128, 8, 2),
    ExactTile(16, 64, 64, 4, 4, swap=True),
    ExactTile(32, 32, 32, 4, 3, swap=True),
)


@pytest.mark.parametrize("capability", [90, 103])
def test_tiles_and_the_number_format_of_the_tensor_core_leave_bits_alone(capability, monkeypatch):
    a, b = operands(40, 70, 96)
    wanted = reference(a, b)
    for tile in TILES:
        monkeypatch.setattr(exact_matmul, "FEW_ROWS", 999 if tile.swap else 0)
        monkeypatch.setattr(exact_matmul, "exact_tiles", always([tile]))
        assert differing(multiply(a, b, capability=capability), wanted) == 0, tile


@pytest.mark.parametrize("capability", [80, 90])
def test_the_copy_engine_changes_no_bit(capability):
    a, b = operands(40, 64, 128)
    kernel = source(lambda x, y: (heal.mm(x, y, "exact5"),), [a, b], capability)
    assert ("make_tensor_descriptor" in kernel) == (capability >= 90)
    assert differ(a, b, capability=capability) == 0


@pytest.mark.parametrize(("capability", "how"), [(75, "exact5"), (90, "exact5:h100")])
def test_what_has_no_kernel_runs_its_reference(capability, how):
    a, b = operands(40, 70, 96)
    kernel = source(lambda x, y: (heal.mm(x, y, how),), [a, b.to(FP16)], capability)
    assert "torch.ops.heal.mm.default" in kernel


# ------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("products", SCHEMES)
@pytest.mark.parametrize("half", [False, True])
def test_a_level_holds_so_many_terms_and_no_more(products, half):
    plan, limit = SCHEMES[products], FP32_ACCUMULATOR if half else INT32_ACCUMULATOR
    levels = [i + j for i, j in plan.pairs]
    most = max(levels.count(level) for level in levels) * DIGIT_MAX**2
    terms = exact_matmul.terms(plan, half=half)
    assert terms * most <= limit < (terms + 1) * most


@pytest.mark.parametrize("rows", [2, 40])
def test_sums_that_are_split_have_the_same_bits(rows, monkeypatch):
    a, b = operands(rows, 33, 300)
    whole = multiply(a, b)
    monkeypatch.setattr(exact_matmul, "terms", always(64))
    assert "LONG : tl.constexpr = True" in source(lambda x, y: (heal.mm(x, y, "exact5"),), [a, b])
    assert differing(multiply(a, b), whole) == 0


def extreme(k: int) -> tuple[Tensor, Tensor]:
    """Digits as large as they get, in sums that grow to K / 2 terms and then cancel."""
    generator = torch.Generator().manual_seed(9)
    largest = 127 * 65793
    a, b = (largest - torch.randint(0, 1 << 17, size, generator=generator).float()
            for size in ((40, k), (k, 33)))  # fmt: skip
    a[:, k // 2 :] *= -1
    return a, b


def test_the_longest_sums_of_the_fp16_route_are_split_and_exact():
    a, b = extreme(2200)
    assert differ(a, b, "exact8", 103) == 0


def test_one_bit_over_the_budget_shows(monkeypatch):
    """The inverse: an FP32 level that adds more than it holds is a float reduction, and rounds."""
    a, b = extreme(2200)
    monkeypatch.setattr(exact_matmul, "terms", always(1 << 20))
    assert differ(a, b, "exact8", 103) > 0


def test_a_k_that_int64_cannot_hold_is_left_to_the_reference_which_refuses_it(monkeypatch):
    long = torch.zeros(1, (1 << 24) + 1)
    monkeypatch.setattr(exact_matmul, "has_kernels", always(True))
    assert exact_matmul.digits_on_cuda(long, long.t(), "exact5") is NotImplemented
    with pytest.raises(ValueError, match="may overflow INT64"):
        reference(long, long.t())


# ----------------------------------------------------------------------------- symbols, gradients


def test_symbolic_rows_have_the_same_bits():
    a, b = operands(70, 33, 80)
    text = generated_source(
        lambda x, y: (heal.mm(x, y, "exact5"),), [a, b], dynamic=True, **PINNED_SETTINGS
    )
    for rows in (70, 40, 33):
        (result,) = interpreter.run(text, rows, a[:rows], b)
        assert differing(result, reference(a[:rows], b)) == 0


def test_a_symbolic_number_of_tokens_is_summed_over_exactly():
    """As in the gradient of a weight: K is a symbol, so that the sum is written to be split."""
    x = operands(70, 1, 12)[0]
    text = generated_source(
        lambda t: (heal.mm(t.t(), t, "exact5"),), [x], dynamic=True, **PINNED_SETTINGS
    )
    assert "LONG : tl.constexpr = True" in text
    for tokens in (70, 3):
        (result,) = interpreter.run(text, tokens, x[:tokens])
        assert differing(result, reference(x[:tokens].t(), x[:tokens])) == 0


def test_the_three_products_of_a_training_step():
    """As the autograd formula of `heal::mm` writes them."""
    generator = torch.Generator().manual_seed(7)
    x, weight = torch.randn(24, 72, generator=generator), torch.randn(40, 72, generator=generator)
    grad = torch.randn(24, 40, generator=generator) * 2.0**-20
    tensors = (x, weight.to(BF16), grad)

    def step(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        mm = heal.mm
        return (
            mm(x, weight.t(), "exact5"),
            mm(grad, weight, "exact5"),
            mm(x.t(), grad, "exact5").t(),
        )

    assert differing(run(step, tensors), step(*tensors)) == 0
