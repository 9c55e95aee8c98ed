"""The promote pass, class by class: aliases, caches, foreign operators, dtypes, accuracy.

`against_torch` explains the two checks: torch's bits on small integers, an FP32 bound against
FP64.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from healpass.config import HealConfig
from healpass.graph import aliases
from tests.support.against_torch import as_accurate_as_fp32, flat, integers, random, same_bits
from tests.support.rewriting import Rewritten, to

U = 2.0**-24
BF16, FP32 = torch.bfloat16, torch.float32


# ------------------------------------------------------------------- who writes, who sees it

X, W, C, V = integers(4, 4), integers(4, 4, seed=1), integers(4, 4, seed=2), integers(2, 4, seed=3)
ROWS = torch.tensor([2, 0])


@torch.library.custom_op("heal_test_promote::double_", mutates_args=("x",))
def double_(x: torch.Tensor) -> None:
    assert x.dtype == BF16
    x.mul_(2)


@torch.library.custom_op("heal_test_promote::second_", mutates_args=("y",))
def second_(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    assert x.dtype == y.dtype == BF16
    y.mul_(2)
    return x + 1


@second_.register_fake
def _(x, y):
    return torch.empty_like(x)


@torch.library.custom_op("heal_test_promote::dtypes", mutates_args=())
def dtypes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    assert (x.dtype, y.dtype) == (FP32, BF16)
    return x + y


@dtypes.register_fake
def _(x, y):
    return torch.empty_like(x)


def cast_is_a_no_op(x, w):
    h = x * 2
    h.to(BF16).add_(1)
    return h, h @ w


def cast_of_an_input_is_a_no_op(x, w):
    x.to(BF16).add_(1)
    return x @ w


def cast_copies(x, w):
    h = (x @ w).float()
    y = h.to(BF16)
    h.add_(1)
    return h, y @ w


def cast_of_an_input_copies(wide, w):
    y = wide.to(BF16)
    wide.add_(1)
    return y @ w


def upcast_copies(x, w):
    h = x @ w
    y = h.float()
    y.add_(1)
    return y, h @ w


def view_of_an_activation(x, w):
    h = x @ w
    h.view(-1)[3:7].mul_(2)
    h[1:].relu_()
    return h, h @ w


def unary_plus_is_a_view(x, w):
    y = +x
    y.mul_(2)
    return x @ w


def select_of_a_cache(c, x, w):
    c.select(0, 1).copy_((x @ w)[0])
    return c @ w


def in_place_arithmetic(x, w):
    h = x @ w
    for _ in range(2):
        h += x
        h *= 2
    return F.relu(h, inplace=True)


def out_argument(x, w, c):
    torch.mm(x, w, out=c)
    torch.add(c, x @ w, out=c)
    return c * 2


def routed_rows(x, w, v):
    out = torch.zeros_like(x)
    out.index_add_(0, ROWS, v @ w)
    out[ROWS] += v
    out[0, 0] = 3.0
    return out @ w


def custom_operator_writes(x, w):
    h = x @ w
    torch.ops.heal_test_promote.double_(h)
    return h @ w


def custom_operator_writes_a_view(x, w):
    h = (x @ w).float().neg().to(BF16)
    torch.ops.heal_test_promote.double_(h[1:])
    return h, h @ w


def custom_operator_writes_its_second(x, w):
    h = torch.zeros(4, 4, dtype=BF16)
    h.add_(x @ w)
    z = torch.ops.heal_test_promote.second_(x @ w.t(), h)
    return h @ w + z


def bits_are_written(x, w):
    h = x @ w
    h.view(torch.int16).bitwise_and_(0x7FFF)
    return h @ w


def bits_are_read(x, w):
    h = x @ w
    return (
        h.view(torch.int16) & 255,
        h.view(dtype=torch.int16),
        (h.view(torch.int32) | 1).view(BF16),
    )


def one_value_in_two_dtypes(x, w):
    h = (x @ w).float()
    y = h.to(BF16)
    return h, y, torch.ops.heal_test_promote.dtypes(h, y), y @ w


WRITERS = {
    cast_is_a_no_op: (X, W),
    cast_of_an_input_is_a_no_op: (X, W),
    cast_copies: (X, W),
    cast_of_an_input_copies: (X.float(), W),
    upcast_copies: (X, W),
    view_of_an_activation: (X, W),
    unary_plus_is_a_view: (X, W),
    select_of_a_cache: (C, X, W),
    in_place_arithmetic: (X, W),
    out_argument: (X, W, C),
    routed_rows: (X, W, V),
    custom_operator_writes: (X, W),
    custom_operator_writes_a_view: (X, W),
    custom_operator_writes_its_second: (X, W),
    bits_are_written: (X, W),
    bits_are_read: (X, W),
    one_value_in_two_dtypes: (X, W),
}


@pytest.mark.parametrize("function", WRITERS, ids=lambda f: f.__name__)
def test_writes_and_aliases_are_those_of_torch(function):
    same_bits(function, WRITERS[function])


NEEDS_MEMORY = (
    cast_copies,
    cast_of_an_input_copies,
    upcast_copies,
    custom_operator_writes,
    custom_operator_writes_a_view,
    bits_are_written,
)


@pytest.mark.parametrize("function", NEEDS_MEMORY, ids=lambda f: f.__name__)
def test_a_pass_blind_to_writes_is_caught(function, monkeypatch):
    """The inverse: without `Memory` the check above fails."""
    monkeypatch.setattr(aliases.Memory, "is_written", lambda *_: False)
    monkeypatch.setattr(aliases.Memory, "is_pinned", lambda *_: False)
    with pytest.raises(AssertionError, match="instead of"):
        same_bits(function, WRITERS[function])


def test_a_custom_operator_is_listed():
    compiled = same_bits(custom_operator_writes, WRITERS[custom_operator_writes])
    assert "foreign operator" in {b.kind for r in compiled.reports for b in r.boundaries}


# --------------------------------------------------------------------------- caches and buffers


def cat(c, x, w):
    k = torch.cat([c, x @ w])
    return k, k @ w


def index_copy(c, x, w):
    c.index_copy_(0, ROWS, (x @ w)[:2])
    return c @ w


def set_item(c, x, w):
    c[1:3] = (x @ w)[:2]
    return c @ w


def scatter(c, x, w):
    return torch.slice_scatter(c, (x @ w)[:2], 0, 1, 3), x @ w


@pytest.mark.parametrize(
    "function", [cat, index_copy, set_item, scatter], ids=lambda f: f.__name__
)
def test_a_16_bit_cache_keeps_its_format_and_is_listed(function):
    """The cache holds the FP32 values rounded once; nothing else in the graph is rounded."""
    c, x, w = (random(4, 4, seed=s) for s in range(3))
    compiled = Rewritten(function, HealConfig())
    cache = c.clone()
    results = flat([compiled(cache, x, w), cache])
    exact = flat([function(c64 := c.double(), x.double(), w.double()), c64])
    kinds = {b.kind for r in compiled.reports for b in r.boundaries}
    assert kinds & {"cache of the caller", "buffer of the caller"}
    for result, wanted in zip(results, exact, strict=True):
        assert result.dtype == BF16
        ulp = 2.0**-8 * wanted.abs() + 2.0**-7 * (wanted.abs().max() * w.abs().sum())
        assert bool(((result - wanted).abs() <= ulp).all())


def test_16_bit_running_statistics_are_those_of_fp32_rounded_once():
    """torch rounds each step of the update; a bound of half an ulp and FP32's error does not."""
    operands = (X + 3, W, torch.zeros(4, dtype=BF16), torch.ones(4, dtype=BF16))

    def function(x, w, mean, variance):
        F.batch_norm(x, mean, variance, training=True, momentum=0.5)
        return x @ w

    ours, exact = copy.deepcopy(operands), to(operands, torch.float64)
    Rewritten(function, HealConfig(kv="fp32"))(*ours)
    function(*exact)
    theirs = copy.deepcopy(operands)
    function(*theirs)
    for i in (2, 3):
        bound = (2.0**-8 + 8 * U) * exact[i].abs()
        print(f"observed/bound {((ours[i] - exact[i]).abs() / bound).max():.3f}")
        assert bool(((ours[i] - exact[i]).abs() <= bound).all())
    assert not bool(((theirs[3] - exact[3]).abs() <= bound).all())  # the inverse


# ----------------------------------------------------------------------------------- accuracy

A, B, G = random(6, 8), random(8, 8, seed=1), random(8, seed=2)


def casts(x, w):
    h = (x @ w).to(BF16)
    h = h.float().type(BF16).type_as(x).bfloat16().to(device="cpu", dtype=BF16).to(x)
    return torch.softmax(h.float(), -1).to(x.dtype) @ w


def casts_in_wider(x, w):
    """`casts` without its casts."""
    return torch.softmax(x @ w, -1) @ w


def factories(x, w):
    h = x @ w
    out = torch.zeros(6, 8, dtype=x.dtype) + h.new_zeros(6, 8) + torch.full_like(h, 0.1)
    return (out + h * torch.arange(8, dtype=x.dtype) + x.new_tensor([1.0] * 8)) @ w


def dtype_arguments(x, w):
    h = x @ w
    return (
        h.sum(0, dtype=x.dtype),
        torch.softmax(h, -1, dtype=x.dtype) @ w,
        h.mean(-1, dtype=x.dtype),
    )


def joins(x, w):
    h = x @ w
    first, second = torch.meshgrid(h[0], x[0], indexing="ij")
    return (
        torch.cat([h, x]) @ w,
        torch.stack([x, h]).sum(0),
        first * second,
        torch.block_diag(h, x),
    )


def normalization(x, w, g):
    h = x @ w
    layer, rms = F.layer_norm(h, (8,), g, g), F.rms_norm(h, (8,), g, 1e-6)
    return layer, rms, F.group_norm(h, 2, g, g), F.normalize(h), h.std(-1), h.norm()


def losses(x, w, g):
    h = x @ w
    target = torch.arange(6)
    return F.cross_entropy(h, target), F.mse_loss(h, x), F.huber_loss(h, x), F.log_softmax(h, -1)


def activations(x, w, g):
    h = x @ w
    return (
        F.gelu(h),
        F.silu(h),
        F.glu(h),
        F.softplus(h),
        F.prelu(h, g[:1]),
        torch.where(h > 0, h, x),
    )


def recurrent_shapes(x, w, g):
    h = (x @ w)[None]
    return (
        F.conv1d(h, w[:3, :6, None].expand(3, 6, 2)),
        F.avg_pool1d(h, 2),
        F.interpolate(h, scale_factor=2),
    )


def selection(x, w):
    h = x @ w
    values, _ = h.topk(3)
    return values.softmax(-1) @ w[:3], h.sort(-1).values, torch.maximum(h, x), h.cumsum(0)


def views_of_a_product(x, w):
    states = (x @ w).view(1, 6, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(states, states, states).transpose(1, 2).view(1, 6, 8) @ w


KEEP_FP32 = (
    factories,
    dtype_arguments,
    joins,
    normalization,
    losses,
    activations,
    recurrent_shapes,
    selection,
    views_of_a_product,
)


@pytest.mark.parametrize("function", KEEP_FP32, ids=lambda f: f.__name__)
def test_activations_stay_fp32(function):
    operands = (A, B, G)[: function.__code__.co_argcount]
    as_accurate_as_fp32(function, operands)


def casts_error(config):
    """Error of `casts` and its budget, against the function with no casts in FP64 and FP32."""
    rewritten = Rewritten(casts, config)(A, B)
    exact, single = (casts_in_wider(*to((A, B), dtype)) for dtype in (torch.float64, FP32))
    budget = 2 * (single - exact).abs().max() + 4 * U * exact.abs().max()
    return (rewritten - exact).abs().max(), budget


def test_casts_of_activations_go():
    error, budget = casts_error(HealConfig(outputs="fp32"))
    print(f"observed/bound {error / budget:.3f}")
    assert error <= budget


def test_a_pass_that_leaves_one_rounding_is_caught():
    """The inverse: with `promote` off the same comparison fails."""
    error, budget = casts_error(HealConfig(outputs="fp32", debug={"disable": ("promote",)}))
    assert error > budget


def test_data_dependent_sizes():
    def function(x, w, mask):
        h = x @ w
        return (h[mask] @ w).sum(0), h[mask.nonzero().flatten()].relu().sum(0)

    mask = torch.tensor([True, False, True, True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = as_accurate_as_fp32(function, (A, B, mask))
    assert len(compiled.graphs) == 1
