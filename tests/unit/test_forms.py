"""Every way to write a matmul becomes a `heal::` operator, within its bound.

All functions here are linear in each operand, so |f(x) - exact| <= n * 2^-24 * f(|x|) to first
order for n roundings along each path from an operand to the result: K of a product, and one per
further operation.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from healpass.graph.forms import bind
from healpass.graph.passes.matmul import FORMS as FORMS_OF_MATMULS
from tests.support.rewriting import Rewritten, absolute, to, worst_ratio
from tests.support.versions import AT_2_11

U = 2.0**-24
BF16 = torch.bfloat16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(BF16)


X, W, V = random(4, 8), random(8, 8, seed=1), random(8)
B3, C3 = random(2, 4, 8), random(2, 8, 4)
D3 = random(2, 4, 4)

#: name -> (function, operands, roundings: the sum of the K of all products and the additions)
FORMS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (X, W, V), 9),
    "linear of a batch": (lambda x, w: F.linear(x, w), (B3, W), 8),
    "linear of a vector": (lambda x, w: F.linear(x, w), (V, W), 8),
    "linear by a vector": (lambda x, w: F.linear(x, w), (X, V), 8),
    "@ broadcast": (lambda a, b: a @ b, (B3[:, None], C3), 8),
    "@ 1x1": (lambda a, b: a @ b, (V, V), 8),
    "@ 1x2": (lambda a, b: a @ b, (V, W), 8),
    "@ 2x1": (lambda a, b: a @ b, (X, V), 8),
    "@ 1x3": (lambda a, b: a @ b, (V, C3), 8),
    "@ 3x1": (lambda a, b: a @ b, (B3, V), 8),
    "@ 2x3": (lambda a, b: a @ b, (X, C3), 8),
    "@ 3x2": (lambda a, b: a @ b, (B3, W), 8),
    "matmul": (torch.matmul, (X, W), 8),
    "linalg.matmul": (torch.linalg.matmul, (X, W), 8),
    "__rmatmul__": (lambda a, b: b.__rmatmul__(a), (X, W), 8),
    "mm": (torch.mm, (X, W), 8),
    "Tensor.mm": (lambda a, b: a.mm(b), (X, W), 8),
    "mm out": (lambda a, b: torch.mm(a, b, out=torch.empty(4, 8, dtype=a.dtype)), (X, W), 8),
    "bmm": (torch.bmm, (B3, C3), 8),
    "addmm": (lambda v, x, w: torch.addmm(v, x, w, beta=2, alpha=0.5), (V, X, W), 11),
    "addmm_": (lambda y, x, w: (y * 1).addmm_(x, w), (X, X, W), 9),
    "addmv": (torch.addmv, (X[:, 0], X, V), 9),
    "baddbmm": (lambda i, a, b: torch.baddbmm(i, a, b, beta=0.5), (D3, B3, C3), 10),
    "addbmm": (torch.addbmm, (D3[0], B3, C3), 17),
    "mv": (torch.mv, (X, V), 8),
    "dot": (torch.dot, (V, V), 8),
    "vdot": (torch.vdot, (V, V), 8),
    "inner": (torch.inner, (B3, W), 8),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (B3, C3), 8),
    "einsum permuted": (lambda a, b: torch.einsum("bij,kj->bki", a, b), (B3, W), 8),
    "einsum of three": (
        lambda a, b, c: torch.einsum("bij,bjk,kl->bl", a, b, c),
        (B3, C3, W[:4]),
        8 + 4 + 4,
    ),
    "einsum sublists": (
        lambda a, b: torch.einsum(a, [0, 1, 2], b, [0, 2, 3], [0, 1, 3]),
        (B3, C3),
        8,
    ),
    "einsum ellipsis": (lambda a, b: torch.einsum("...ij,...jk", a, b), (B3, C3), 8),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=1), (B3, W), 8),
    "tensordot of pairs": (
        lambda a, b: torch.tensordot(a, b, dims=([0, 2], [0, 1])),
        (B3, C3),
        16,
    ),
    "chain_matmul": (lambda a, b: torch.chain_matmul(a, b, b), (X, W), 16),
    "multi_dot": (lambda a, b: torch.linalg.multi_dot([a, b, b]), (X, W), 16),
    "bilinear": (lambda x, w, b: F.bilinear(x, x, w, b), (X, random(3, 8, 8), V[:3]), 17),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_matmul_is_rewritten_and_within_its_bound(name):
    function, operands, roundings = FORMS[name]
    rewritten = Rewritten(function)
    result = rewritten(*operands)
    exact = function(*to(operands, torch.float64))
    budget = roundings * U * function(*absolute(operands)) * (1 + roundings * U)
    assert rewritten.nodes, "nothing was found to rewrite"
    assert not rewritten.kept
    assert result.dtype == torch.float32
    ratio = worst_ratio(result, exact, budget)
    print(f"{name}: observed/bound {ratio:.3f}")
    assert ratio <= 1


def test_the_bound_catches_a_product_that_is_rounded_to_16_bits():
    function, operands, roundings = FORMS["linear"]
    exact = function(*to(operands, torch.float64))
    budget = roundings * U * function(*absolute(operands))
    assert worst_ratio(function(*operands), exact, budget) > 1


def test_addmm_with_beta_zero_does_not_read_its_first_operand():
    poison = torch.full_like(V, float("nan"))
    result = Rewritten(lambda v, x, w: torch.addmm(v, x, w, beta=0))(poison, X, W)
    assert result.isfinite().all()


def test_in_place_addmm_writes_into_the_callers_tensor():
    mine, expected = X.clone(), (X.double() + X.double() @ W.double())
    Rewritten(lambda y, x, w: y.addmm_(x, w))(mine, X, W)
    assert mine.dtype == BF16
    budget = 9 * U * (X.double().abs() + X.double().abs() @ W.double().abs())
    assert worst_ratio(mine, expected, budget + 2**-8 * expected.abs() * (1 + 9 * U)) <= 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention_is_rewritten(training, weights):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=BF16).train(training)
    rewritten = Rewritten(lambda x: module(x, x, x, need_weights=weights)[0])
    result = rewritten(B3)
    assert not rewritten.kept
    assert len(rewritten.nodes) == (4 if weights else 3)
    _as_good_as_fp32(result, module, lambda m, x: m(x, x, x, need_weights=weights)[0], B3)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_path_of_an_encoder_layer_is_rewritten(norm_first, masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, batch_first=True, norm_first=norm_first, activation="gelu", dtype=BF16
    ).eval()
    mask = torch.tensor([[False, False, True, True], [False] * 4]) if masked else None

    def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x, src_key_padding_mask=mask)

    with torch.no_grad():
        rewritten = Rewritten(lambda x: call(layer, x))
        result = rewritten(B3)
        assert not rewritten.kept
        assert len(rewritten.nodes) == 5
        _as_good_as_fp32(result, layer, call, B3)


def _as_good_as_fp32(result, module, call, x):
    """At most twice the error of the same module in FP32, both against FP64."""
    wide, single = copy.deepcopy(module).double(), copy.deepcopy(module).float()
    exact = call(wide, x.double()).detach()
    ours = (result.detach().double() - exact).norm()
    theirs = (call(single, x.float()).detach().double() - exact).norm()
    floor = U * exact.norm()
    print(f"error / FP32's error: {float(ours / theirs.clamp_min(floor)):.2f}")
    assert ours <= 2 * theirs.clamp_min(floor)


# ------------------------------------------------------------------------------ bound arguments


def node_of(*args, **kwargs):
    graph = torch.fx.Graph()
    return graph.call_function(torch.mm, args, kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "bound"),
    [
        ((1, 2), {}, [1, 2, None, None]),
        ((1, 2, torch.float32), {}, [1, 2, torch.float32, None]),
        ((1,), {"mat_b": 2, "out": 3}, [1, 2, None, 3]),
        ((), {"self": 1, "mat2": 2, "out_dtype": torch.float32}, [1, 2, torch.float32, None]),
        ((1, 2, 3, 4), {}, None),
        ((1, 2), {"mat2": 3}, None),
        ((1, 2), {"bias": 3}, None),
        ((1, 2), {"bias": None, "inplace": True}, [1, 2, None, None]),
    ],
)
def test_arguments_are_bound_as_torch_takes_them_or_not_at_all(args, kwargs, bound):
    """A dtype in `out`'s place, or an argument dropped in silence, would be a wrong result."""
    assert bind(FORMS_OF_MATMULS["mm"], node_of(*args, **kwargs)) == bound


OLD = {
    "addmm": lambda t, a: torch.addmm(0.5, t, a, a),
    "Tensor.addmm": lambda t, a: t.addmm(0.5, a, a),
    "in place": lambda t, a: (t * 1).addmm_(0.5, a, a),
    "with two factors": lambda t, a: torch.addmm(0.5, t, 2, a, a),
}


@pytest.mark.filterwarnings("ignore:This overload")
@pytest.mark.parametrize("name", OLD)
def test_torchs_old_order_of_arguments_is_kept_and_right(name):
    """A factor comes first there, and no operand may be taken for another."""
    rewritten = Rewritten(OLD[name])
    exact, budget = OLD[name](W.double(), W.double()), 12 * U * OLD[name](*absolute((W, W)))
    assert worst_ratio(rewritten(W, W), exact, budget) <= 1
    assert set(rewritten.kept.values()) == {"no heal operator for these arguments"}


WIDER = {
    "mm by position": (lambda a, b: torch.mm(a, b, torch.float32), (X, W)),
    "mm by name": (lambda a, b: torch.mm(a, b, out_dtype=torch.float32), (X, W)),
    "bmm": (lambda a, b: torch.bmm(a, b, torch.float32), (B3, C3)),
    "addmm": (lambda a, b: torch.addmm(a.new_zeros(()).float(), a, b, torch.float32), (X, W)),
}


@pytest.mark.parametrize("name", WIDER)
def test_a_result_that_is_asked_for_in_fp32_is(name):
    """torch's own CPU kernels lack these overloads; the product of ours is FP32 anyway."""
    if AT_2_11 and name == "addmm":
        pytest.skip("torch 2.11 cannot tell the shape of this overload")
    function, operands = WIDER[name]
    rewritten = Rewritten(function)
    result = rewritten(*operands)
    assert not rewritten.kept
    assert result.dtype == torch.float32
    exact, terms = operands[0].double() @ operands[1].double(), operands[0].shape[-1] + 1
    bound = terms * 2.0**-24 * (operands[0].double().abs() @ operands[1].double().abs())
    ratio = ((result.double() - exact).abs() / bound).max()
    print(f"observed/bound {ratio:.3f}")
    assert ratio <= 1
