"""Code that Inductor generates from the templates keeps its bound, in Triton's interpreter.

What is generated here is what a GPU would run, byte for byte; only the interpreter stands in for
the GPU. Padding is NaN, so a read past the end shows.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from healpass.arithmetic.pieces import split_fp16
from healpass.lowering.cuda import matmul, operands
from healpass.lowering.cuda.tiles import Tile
from tests.support import interpreter
from tests.support.fake_cuda import always, generated_source
from tests.support.matmul_runs import (
    DTYPES,
    LARGEST,
    Layout,
    assert_within_bound,
    capabilities,
    multiply,
    shapes,
    sides,
    values,
)
from tests.support.template_bounds import template_bound


@given(shapes(), sides, sides, st.sampled_from(["heal", "heal", "layercast"]), capabilities)
def test_every_product_is_within_its_bound(shape, left, right, numerics, capability):
    a, b = left.tensor(*shape[0]), right.tensor(*shape[1])
    worst = assert_within_bound(a, b, multiply(a, b, numerics, capability), numerics)
    target(worst, label="observed / bound")


@settings(max_examples=15)
@given(shapes(st.integers(1, 16)), sides, sides, st.sampled_from(["heal", "layercast"]))
def test_decode_is_within_its_bound(shape, left, right, numerics):
    a, b = left.tensor(*shape[0]), right.tensor(*shape[1])
    worst = assert_within_bound(a, b, multiply(a, b, numerics), numerics)
    target(worst, label="observed / bound")


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("k", [700, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_are_within_their_bound(m, k, dtype):
    a = values((m, k), torch.float32, 0, 0)
    b = values((k, 40), dtype, 1, 0)
    assert_within_bound(a, b, multiply(a, b), "heal")


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (20, 5, 0)])
def test_empty_products_are_zero(shape):
    m, n, k = shape
    result = multiply(torch.ones(m, k), torch.ones(k, n, dtype=torch.bfloat16))
    assert torch.equal(result, torch.zeros(m, n))


@pytest.mark.parametrize("m", [4, 20])
def test_expanded_operands_are_read_as_they_are(m):
    row, column = values((1, 70), torch.float32, 10, 0), values((70, 1), torch.bfloat16, 11, 0)
    a, b = row.expand(m, 70), column.expand(70, 33)
    assert_within_bound(a, b, multiply(a, b), "heal")


def test_an_expanded_batch_is_read_as_it_is():
    a, b = values((3, 20, 70), torch.float32, 12, 0), values((1, 70, 33), torch.bfloat16, 13, 0)
    assert_within_bound(a, b.expand(3, 70, 33), multiply(a, b.expand(3, 70, 33)), "heal")


@pytest.mark.parametrize("rows", [3, 24])
def test_forward_and_backward_of_a_layer_are_within_their_bounds(rows):
    """The three products of a training step as the operators' autograd formula writes them.

    (Autograd itself cannot run on fake CUDA tensors.) A 16-bit weight's gradient is rounded once.
    """

    def step(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        mm, transposed = torch.ops.heal.mm, weight.t()
        grad_weight = mm(x.t(), grad, "heal").to(weight.dtype).t()
        return mm(x, transposed, "heal"), mm(grad, transposed.t(), "heal"), grad_weight

    x, weight = values((rows, 72), torch.float32, 16, 0), values((40, 72), torch.bfloat16, 17, 0)
    grad = values((rows, 40), torch.float32, 18, -20)
    tensors = (x, weight, grad)
    result, grad_x, grad_weight = interpreter.run(generated_source(step, tensors), *tensors)
    assert_within_bound(x, weight.mT, result, "heal")
    assert_within_bound(grad, weight, grad_x, "heal")
    exact = grad.mT.double() @ x.double()
    bound = template_bound(x.mT, grad).mT + exact.abs() * 2.0**-8
    assert grad_weight.dtype == torch.bfloat16
    assert ((grad_weight.double() - exact).abs() <= bound).all()


def test_symbolic_rows_are_within_their_bound():
    a, b = values((40, 70), torch.float32, 14, 0), values((70, 33), torch.bfloat16, 15, 0)
    source = generated_source(
        lambda x, y: (torch.ops.heal.mm(x, y, "heal"),), [a, b], dynamic=True
    )
    for rows in (40, 17, 33):
        (result,) = interpreter.run(source, rows, a[:rows], b)
        assert torch.equal(result, multiply(a[:rows], b))


@pytest.mark.parametrize("features", [12, 40])
def test_a_symbolic_number_of_tokens_is_summed_over_within_the_bound(features):
    """As in the gradient of a weight: K is a symbol, A lies transposed."""
    x = values((70, features), torch.float32, 19, 0)
    source = generated_source(lambda t: (torch.ops.heal.mm(t.t(), t, "heal"),), [x], dynamic=True)
    for tokens in (70, 64, 3):
        (result,) = interpreter.run(source, tokens, x[:tokens])
        assert_within_bound(x[:tokens].t(), x[:tokens], result, "heal", decode=False)


SPECIAL = (0.0, -0.0, 1.0, -3.0, torch.inf, -torch.inf, torch.nan, 2.0**100, 2.0**-140)


@given(
    st.integers(0, 2**30),
    st.sampled_from([2, 20]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from(["heal", "heal", "heal:::m_invariant"]),
)
def test_infinities_and_nans_are_those_of_fp32(seed, m, left, right, in_weight, numerics):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, 40, generator=generator), torch.randn(40, 12, generator=generator)
    target = b if in_weight else a
    places = torch.randint(0, target.numel(), (6,), generator=generator)
    picks = torch.randint(0, len(SPECIAL), (6,), generator=generator)
    target.view(-1)[places] = torch.tensor(SPECIAL)[picks]
    a, b = a.to(left), b.to(right)
    expected = a.float() @ b.float()
    result = multiply(a, b, numerics)
    same = (result.isnan() == expected.isnan()) & (result.isinf() == expected.isinf())
    signs = ~expected.isinf() | (result == expected)
    assert (same & signs).all()


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_do_not_overflow_when_they_are_cut(m, dtype):
    a, b = torch.zeros(m, 40), torch.full((40, 12), 0.5, dtype=dtype)
    a[:, 3] = LARGEST
    assert torch.equal(multiply(a, b), torch.full((m, 12), LARGEST / 2))


def test_subnormal_rows_keep_their_values():
    """A row of nothing but FP32 subnormals: the floor of the scale loses none of them."""
    a = torch.full((20, 8), 2.0**-149)
    b = torch.full((8, 4), 2.0**20, dtype=torch.bfloat16)
    assert torch.equal(multiply(a, b), torch.full((20, 4), 2.0**-126))


def test_a_large_scale_of_one_operand_meets_a_small_one_of_the_other():
    """2^100 by 2^-100: neither step of the final scaling overflows or underflows."""
    a = torch.full((20, 64), 2.0**100)
    b = torch.full((64, 4), 2.0**-100)
    assert torch.equal(multiply(a, b), torch.full((20, 4), 64.0))


@pytest.mark.parametrize("numerics", ["heal", "layercast"])
@pytest.mark.parametrize("right", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [(1, 3, 16), (17, 33, 140)])
def test_a_row_does_not_depend_on_the_number_of_rows(rows, right, numerics):
    a, b = values((rows[-1], 300), torch.float32, 2, 0), values((300, 70), right, 3, 0)
    whole = multiply(a, b, numerics)
    for count in rows[:-1]:
        assert torch.equal(multiply(a[:count], b, numerics), whole[:count])


@pytest.mark.parametrize("precision", ["heal", "layercast"])
@pytest.mark.parametrize("right", DTYPES)
def test_m_invariant_rows_cross_the_border_of_decode_and_prefill(right, precision):
    a, b = values((70, 600), torch.float32, 2, 0), values((600, 70), right, 3, 0)
    numerics = f"{precision}:::m_invariant"
    whole = multiply(a, b, numerics)
    assert_within_bound(a, b, whole, precision, decode=True)
    for count in (1, 16, 17, 40):
        assert torch.equal(multiply(a[:count], b, numerics), whole[:count])


@pytest.mark.parametrize("precision", ["heal", "layercast"])
def test_without_m_invariant_rows_differ_across_the_border(precision):
    """Two families, two orders of summation: the check above notices."""
    a, b = values((17, 600), torch.float32, 2, 0), values((600, 70), torch.bfloat16, 3, 0)
    assert not torch.equal(multiply(a[:16], b, precision), multiply(a, b, precision)[:16])


@pytest.mark.parametrize("right", [torch.bfloat16, torch.float32])
def test_tiles_of_the_invariant_kernel_leave_bits_alone(right, monkeypatch):
    a, b = values((140, 300), torch.float32, 4, 0), values((300, 70), right, 5, 0)
    results = []
    for tile in (Tile(16, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)):
        monkeypatch.setattr(matmul, "invariant_tiles", always([tile]))
        results.append(multiply(a, b, "heal:::m_invariant"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("right", "capability"), [(torch.bfloat16, 80), (torch.float32, 90)])
def test_tiles_and_cutting_in_registers_leave_bits_alone(right, capability, monkeypatch):
    a, b = values((140, 130), torch.float32, 4, 0), values((130, 70), right, 5, 0)
    results = []
    for few, tile in (
        (0, Tile(128, 128, 8, 3)),
        (0, Tile(64, 64, 4, 3)),
        (999, Tile(128, 64, 8, 3)),
    ):
        monkeypatch.setattr(matmul, "FEW_COLUMNS", few)
        monkeypatch.setattr(matmul, "FEW_ROWS", few)
        monkeypatch.setattr(matmul, "gemm_tiles", always([tile]))
        results.append(multiply(a, b, "heal", capability))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_chain_is_as_long_as_the_generation_asks_for():
    """Chains of 32 on sm_80, 64 on sm_90; those of a tile are summed before the register rounds.

    The interpreter rounds each dot once, so the bits tell how long a chain was.
    """
    a = torch.randn(20, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    b = torch.randn(200, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = {}
    for capability, chain_k in ((80, 32), (90, 64)):
        register = torch.zeros(20, 40)
        for tile in range(0, 200, 64):
            parts = [slice(k, min(k + chain_k, 200)) for k in range(tile, tile + 64, chain_k)]
            chains = [(a[:, part].double() @ b[part].double()).float() for part in parts]
            register = register + sum(chains[1:], chains[0])
        found[capability] = multiply(a, b, "heal", capability)
        assert torch.equal(found[capability], register)
    assert not torch.equal(found[80], found[90])


@pytest.mark.parametrize(("rows", "cut"), [(128, True), (300, False)])
def test_the_low_piece_breaks_ties_as_the_reference_does(rows, cut):
    """By one each product is its operand's pieces: outward on a tie, in 1/4 of all numbers."""
    x = values((rows, 1), torch.float32, 22, 0)
    b = torch.ones(1, 8, dtype=torch.bfloat16)
    source = generated_source(lambda a, w: (torch.ops.heal.mm(a, w, "heal"),), [x, b])
    assert ("A_CUT : tl.constexpr = True" in source) == cut
    pieces = split_fp16(x)
    meant = (pieces.pieces[0].float() + pieces.pieces[1].float()) * pieces.scale
    (result,) = interpreter.run(source, x, b)
    assert torch.equal(result, meant.expand(rows, 8))
    even = x * (1 / pieces.scale)
    rest = even - even.half().float()
    assert not torch.equal(even.half().float() + rest.half().float(), meant / pieces.scale)


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.integers(0, 20),
    st.sampled_from([2, 33, 70]),
    st.sampled_from([1, 65, 100]),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_routed_rows_and_columns_are_within_their_bound(sizes, rest, n, k, right, columns):
    """Groups of any size, empty ones too; what lies past the last group is zero."""
    ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = max(1, sum(sizes) + rest)
    a = values((rows, k), torch.float32, 20, 0)
    b = values((len(sizes), k, n), right, 21, 0)
    if columns:
        tensors, turned = (b.mT.contiguous(), a.t().contiguous(), ends), True
    else:
        tensors, turned = (a, b, ends), False
    source = generated_source(
        lambda x, y, offs: (torch.ops.heal.grouped_mm(x, y, offs, "heal"),), tensors
    )
    assert "heal_group_of_tile" in source
    (result,) = interpreter.run(source, *tensors)
    result = result.t() if turned else result
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            part = result[start:end]
            assert_within_bound(a[start:end], b[group], part, "heal", decode=False)
        start = end
    assert not result[start:].any()


def test_a_routed_row_does_not_tell_who_shares_its_group():
    a, b = values((80, 130), torch.float32, 22, 0), values((2, 130, 40), torch.bfloat16, 23, 0)

    def routed(x: Tensor, *ends: int) -> Tensor:
        tensors = (x, b, torch.tensor(ends, dtype=torch.int32))
        source = generated_source(
            lambda x, y, offs: (torch.ops.heal.grouped_mm(x, y, offs, "heal"),), tensors
        )
        return interpreter.run(source, *tensors)[0]

    whole = routed(a, 30, 80)
    assert torch.equal(routed(a[20:], 10, 60), whole[20:])
    assert torch.equal(multiply(a, b[1])[30:], whole[30:]), "the bits of the gemm family"


ALIGNED = [Layout(transposed, padding) for transposed in (False, True) for padding in (0, 8)]


@pytest.mark.parametrize(
    ("right", "lead"), [(torch.bfloat16, ()), (torch.float32, ()), (torch.float16, (2,))]
)
@pytest.mark.parametrize("layouts", [*zip(ALIGNED, reversed(ALIGNED), strict=True)])
def test_the_copy_engine_changes_no_bit(layouts, right, lead, monkeypatch):
    """Tiles by tensor descriptor, in each orientation and past every end, against plain loads."""
    a = layouts[0].lay(values((*lead, 40, 72), torch.float32, 4, 0))
    b = layouts[1].lay(values((*lead, 72, 72), right, 5, 0))
    monkeypatch.setattr(matmul, "FEW_ROWS", 0)  # all operands in planes
    by_descriptor = multiply(a, b)
    assert_within_bound(a, b, by_descriptor, "heal")
    monkeypatch.setattr(matmul, "TMA_CAPABILITY", 999)
    assert torch.equal(by_descriptor, multiply(a, b))


def test_the_rows_differ_if_the_chunk_follows_the_rows(monkeypatch):
    """The check of row equality notices a chunk of K that depends on M."""
    a, b = values((16, 1024), torch.float32, 6, 0), values((1024, 32), torch.bfloat16, 7, 0)
    whole = multiply(a, b)
    monkeypatch.setattr(matmul, "decode_chunk", lambda k: (k, 1))
    assert not torch.equal(multiply(a[:3], b), whole[:3])


def test_the_bound_notices_a_scale_that_is_too_small(monkeypatch):
    """With rows scaled to 2^-12 instead of 2^14 the low pieces drown in FP16's subnormals."""
    a, b = values((20, 128), torch.float32, 8, 0), values((128, 32), torch.bfloat16, 9, 0)
    assert_within_bound(a, b, multiply(a, b), "heal")
    monkeypatch.setattr(operands, "TOP_EXPONENT", -12)
    with pytest.raises(AssertionError, match="observed / bound"):
        assert_within_bound(a, b, multiply(a, b), "heal")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bound_notices_a_lost_piece(dtype, monkeypatch):
    """With one BF16 piece for an FP32 operand, as in plain BF16 arithmetic, the check fails."""
    monkeypatch.setattr(matmul, "BF16_PIECES", dict.fromkeys(DTYPES, 1))
    a, b = values((4, 128), torch.float32, 8, 0), values((128, 32), dtype, 9, 0)
    with pytest.raises(AssertionError, match="observed / bound"):
        assert_within_bound(a, b, multiply(a, b), "heal")
