"""The `heal::` operators agree with the torch operators they replace, on torch's own samples."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import healpass.ops  # noqa: F401
from tests.support.against_torch import chance
from tests.support.rewriting import absolute, to, worst_ratio

heal = torch.ops.heal
U = 2.0**-24
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def samples(name: str, dtype: torch.dtype):
    """Torch's sample inputs for an operator, as (positional, keyword) arguments."""
    (info,) = [op for op in op_db if op.name == name and op.variant_test_name == ""]
    torch.manual_seed(0)
    for sample in info.sample_inputs("cpu", dtype):
        yield (sample.input, *sample.args), sample.kwargs


#: torch operator -> the operator that stands for it
PRODUCTS = {
    "mm": heal.mm,
    "bmm": heal.bmm,
    "matmul": heal.matmul,
    "mv": heal.matmul,
    "dot": heal.matmul,
    "__rmatmul__": lambda a, b: heal.matmul(b, a),
    "nn.functional.linear": heal.linear,
}
REFERENCES = {
    "mm": torch.mm,
    "bmm": torch.bmm,
    "matmul": torch.matmul,
    "mv": torch.mv,
    "dot": torch.dot,
    "__rmatmul__": lambda a, b: torch.matmul(b, a),
    "nn.functional.linear": F.linear,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_within_k_u_on_torchs_samples(name, dtype):
    worst = 0.0
    for args, kwargs in samples(name, dtype):
        result = PRODUCTS[name](*args, **kwargs)
        exact = REFERENCES[name](*to(args, torch.float64), **to(kwargs, torch.float64))
        terms = args[0].shape[-1] if args[0].dim() else 1
        terms = max(terms, args[1].shape[-1] if name == "__rmatmul__" else 0) + 1
        size = REFERENCES[name](*absolute(args), **absolute(kwargs))
        assert result.dtype == torch.float32
        assert result.shape == exact.shape
        worst = max(worst, worst_ratio(result, exact, terms * U * size * (1 + terms * U)))
    print(f"{name} {dtype}: observed/bound {worst:.3f}")
    assert worst <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sdpa_is_as_good_as_torchs_fp32_on_torchs_samples(dtype):
    sdpa, checked = F.scaled_dot_product_attention, 0
    for args, kwargs in samples("nn.functional.scaled_dot_product_attention", dtype):
        if kwargs.get("dropout_p"):
            continue  # random: tested by its statistics below
        result = heal.sdpa(*args, **kwargs)
        exact = sdpa(*to(args, torch.float64), **to(kwargs, torch.float64))
        single = sdpa(*to(args, torch.float32), **to(kwargs, torch.float32))
        theirs = (single.double() - exact).norm()
        limit = chance(exact.numel()) * theirs + 2 * U * exact.norm()  # and one rounding
        assert (result.double() - exact).norm() <= limit
        checked += 1
    assert checked >= 8


def test_sdpa_dropout_drops_the_stated_share_and_keeps_the_mean():
    torch.manual_seed(0)
    query = torch.zeros(1, 1, 200, 4)
    value = torch.eye(100).expand(1, 1, 100, 100)
    weights = heal.sdpa(query, torch.zeros(1, 1, 100, 4), value, dropout_p=0.25)
    dropped = int((weights == 0).sum())
    count, share = weights.numel(), 0.25
    deviation = (count * share * (1 - share)) ** 0.5
    assert abs(dropped - count * share) < 5 * deviation
    kept = weights[weights != 0].double()
    assert (
        (kept * 75 - 1).abs() <= 4 * U
    ).all()  # 1/100, scaled by 1/0.75: four roundings at most


def test_sdpa_gives_zeros_for_a_row_whose_keys_are_all_masked():
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    result = heal.sdpa(query, key, key, mask)
    assert (result[:, :, 1] == 0).all()
    assert (result[:, :, 0] != 0).all()


def test_sdpa_refuses_a_mask_beside_is_causal():
    query = torch.randn(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="exclude each other"):
        heal.sdpa(query, query, query, torch.ones(2, 2, dtype=torch.bool), is_causal=True)


# ------------------------------------------------------------------------------------ opcheck


def attention_backward_call(q, k):
    call = (q, k, k, torch.randn(3, 5), None, None, False, 0.5, None, None, 0.0, "heal")
    output, logsumexp = heal.attention(*call)
    return (torch.randn_like(output), *call, output, logsumexp)


def operator_calls():
    """One call per operator, operands that need gradients and mixed dtypes among them."""
    a = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(4, 5, requires_grad=True)
    q = torch.randn(2, 4, 3, 8, requires_grad=True)
    k = torch.randn(2, 2, 5, 8, dtype=torch.float16, requires_grad=True)
    offs = torch.tensor([1, 3], dtype=torch.int32)
    mask = torch.randn(3, 5, requires_grad=True)
    yield "mm", (a, b), {}
    yield "bmm", (a[None].detach(), b[None].detach()), {}
    yield "linear", (a, b.t(), torch.randn(5, dtype=torch.float16)), {}
    yield "matmul", (a, b), {}
    yield "grouped_mm", (a, torch.stack([b, b]), offs), {}
    rest = (mask, torch.randn(4, requires_grad=True), None, False, 0.5, 3, 2.0, 0.0, "heal")
    yield "attention", (q, k, k, *rest), {}
    yield "attention_backward", attention_backward_call(q.detach(), k.detach()), {}
    yield "attention_mask_grad", attention_backward_call(q.detach(), k.detach()), {}
    yield "sdpa", (q, k, k), {"enable_gqa": True, "is_causal": True}


@pytest.mark.parametrize("call", list(operator_calls()), ids=lambda call: call[0])
def test_opcheck_is_green(call):
    name, args, kwargs = call
    results = torch.library.opcheck(getattr(heal, name).default, args, kwargs)
    assert set(results.values()) == {"SUCCESS"}


# ----------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_rounded_once_to_the_operands_dtype(dtype):
    torch.manual_seed(0)
    a = torch.randn(5, 7).to(dtype).requires_grad_()
    b = torch.randn(7, 6).to(dtype).requires_grad_()
    upstream = torch.randn(5, 6)
    heal.mm(a, b).backward(upstream)
    for operand, exact, terms, size in (
        (a, upstream.double() @ b.double().t(), 6, upstream.double().abs() @ b.double().abs().t()),
        (b, a.double().t() @ upstream.double(), 5, a.double().abs().t() @ upstream.double().abs()),
    ):
        assert operand.grad.dtype == dtype
        fp32 = terms * U * size
        half_step = torch.finfo(dtype).eps / 2
        budget = fp32 + half_step * (exact.abs() + fp32)
        assert worst_ratio(operand.grad, exact.detach(), budget.detach()) <= 1


def grouped_forms():
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    yield "2x3", torch.randn(6, 4), torch.randn(3, 4, 5), offs
    yield "2x2", torch.randn(4, 6), torch.randn(6, 5), offs
    yield "3x2", torch.randn(3, 4, 2), torch.randn(2, 6), offs


@pytest.mark.parametrize("form", list(grouped_forms()), ids=lambda form: form[0])
def test_grouped_mm_and_its_gradients_are_those_of_the_single_products(form):
    name, a, b, offs = form
    a, b = a.requires_grad_(), b.requires_grad_()
    result = heal.grouped_mm(a, b, offs)
    bounds, parts = [0, *offs.tolist()], []
    for group, (start, end) in enumerate(itertools.pairwise(bounds)):
        span = slice(start, end)
        left = a[group] if a.dim() == 3 else (a[span] if b.dim() == 3 else a[:, span])
        right = b[group] if b.dim() == 3 else (b[:, span] if a.dim() == 3 else b[span])
        parts.append(heal.mm(left, right))
    expected = torch.stack(parts) if name == "2x2" else torch.cat(parts, 0 if name == "2x3" else 1)
    last = offs[-1]
    routed = result if name == "2x2" else (result[:last] if name == "2x3" else result[:, :last])
    assert torch.equal(routed, expected)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(routed, (a, b), upstream)
    theirs = torch.autograd.grad(expected, (a, b), upstream)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_what_lies_past_the_last_group_is_zero():
    result = heal.grouped_mm(
        torch.full((6, 4), float("nan")),
        torch.randn(1, 4, 5),
        torch.tensor([0], dtype=torch.int32),
    )
    assert (result == 0).all()


def test_second_order_gradients_in_eager():
    """Compare with finite differences of the first order, in steps that FP32 resolves."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    q, k = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 1, 5, 4, requires_grad=True)
    cases = (
        (lambda a, b: heal.mm(a, b).pow(3).sum(), lambda a, b: (a @ b).pow(3).sum(), (a, b)),
        (
            lambda q, k: heal.sdpa(q, k, k, enable_gqa=True).pow(3).sum(),
            lambda q, k: torch.softmax(q @ k.mT / 2, -1).matmul(k).pow(3).sum(),
            (q, k),
        ),
    )
    for ours, reference, inputs in cases:
        found = second_order(ours, inputs)
        exact = second_order(
            reference, tuple(x.detach().double().requires_grad_() for x in inputs)
        )
        single = second_order(reference, inputs)
        for one, truth, plain in zip(found, exact, single, strict=True):
            theirs = (plain.double() - truth).norm() + 8 * U * truth.norm()
            assert (one.double() - truth).norm() <= 2 * theirs


def second_order(function, inputs):
    """The gradient of the squared norm of the gradient."""
    first = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)


# ------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_go_through_as_in_an_fp32_product(dtype):
    a = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0], [0.0, 2.0]], dtype=dtype)
    b = torch.tensor([[1.0, 0.0], [1.0, -1.0]], dtype=dtype)
    assert torch.equal(
        heal.mm(a, b).nan_to_num(7.0), torch.mm(a.float(), b.float()).nan_to_num(7.0)
    )


@pytest.mark.parametrize("shapes", [((0, 4), (4, 3)), ((2, 0), (0, 3)), ((2, 4), (4, 0))])
def test_empty_operands(shapes):
    result = heal.mm(torch.randn(shapes[0]), torch.randn(shapes[1]))
    assert result.shape == (shapes[0][0], shapes[1][1])
    assert (result == 0).all()


def test_fp32_stays_fp32_when_torchs_flags_allow_less():
    """`set_float32_matmul_precision("medium")` lets torch.mm drop to BF16; ours may not."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 256), torch.randn(256, 64)
    before = heal.mm(a, b)
    earlier = torch.compile(lambda a, b: a @ b, backend="heal")
    assert torch.equal(before, earlier(a, b))
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        after = heal.mm(a, b)
        compiled = torch.compile(torch.mm, backend="heal")(a, b)
        assert torch.equal(before, earlier(a, b)), "compiled before the flag was set"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(before, after)
    assert torch.equal(before, compiled)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.complex64])
def test_other_dtypes_are_refused_by_name(dtype):
    a = torch.ones(2, 2).to(dtype)
    with pytest.raises(TypeError, match=r"heal::mm got a torch\.\w+ operand"):
        heal.mm(a, a)


def test_forward_mode_is_refused_instead_of_a_silent_zero_tangent():
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="heal::mm has no forward-mode derivative"):
        torch.func.jvp(lambda rows: heal.mm(rows, w), (x,), (x,))


def test_unknown_numerics_are_refused():
    with pytest.raises(ValueError, match="numerics='best'"):
        heal.mm(torch.ones(2, 2), torch.ones(2, 2), "best")
