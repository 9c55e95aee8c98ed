"""Promotion across borders: subgraphs, autocast regions, torch.func transforms, gradients.

`against_torch` explains the two checks: torch's bits on small integers, an FP32 bound against
FP64.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

from healpass.config import HealConfig
from tests.support.against_torch import as_accurate_as_fp32, flat, integers, random, same_bits
from tests.support.rewriting import Rewritten

U = 2.0**-24
BF16, FP32 = torch.bfloat16, torch.float32
X, W = integers(4, 4), integers(4, 4, seed=1)
A, B = random(4, 4), random(4, 4, seed=1)

# ------------------------------------------------------------------------------- subgraphs


def checkpointed(x, w):
    def inner(x, w):
        return torch.relu(x @ w)

    def outer(x, w):
        y = checkpoint(inner, x, w, use_reentrant=False)
        return y @ w, y.to(x.dtype), x

    h = x @ w
    a, b, c = checkpoint(outer, h, w, use_reentrant=False)
    return a, b, c, h


def branches(x, w):
    h = x @ w
    return torch.cond(x.sum() > 0, lambda h: (h @ w).relu(), lambda h: h * 2, (h,)) @ w


def branches_of_a_weight_and_a_product(x, w):
    h = x @ w
    return torch.cond(x.sum() > 0, lambda h: h @ w, lambda _: w.clone(), (h,)) @ w


def nested_branches(x, w):
    def inner(h):
        return torch.cond(h.sum() > 0, lambda h: h @ w, lambda h: h - w, (h,))

    return torch.cond(x.sum() > 0, inner, lambda h: h * 2, (x @ w,)) @ w


ACCURATE = (checkpointed, branches, branches_of_a_weight_and_a_product, nested_branches)


@pytest.mark.parametrize("function", ACCURATE, ids=lambda f: f.__name__)
def test_activations_stay_fp32_through_a_subgraph(function):
    compiled = as_accurate_as_fp32(function, (A, B))
    assert not compiled.kept
    same_bits(function, (X, W))


def loop(x, w):
    first = torch.zeros((), dtype=torch.int64)
    condition, body = (lambda i, _: i < 3), (lambda i, h: (i + 1, (h @ w).sign()))
    return while_loop(condition, body, (first, x @ w))[1] @ w


def scanned(x, w):
    def step(carry, row):
        following = torch.sign(carry @ w + row)
        return following, following * 2

    h = x @ w
    carry, rows = scan(step, h[0], h)
    return carry, rows @ w


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.t() @ grad


def custom_function(x, w):
    h = x @ w
    return Product.apply(h, w) + h


@pytest.mark.parametrize("function", [loop, scanned, custom_function], ids=lambda f: f.__name__)
def test_other_subgraphs_keep_their_traced_border_and_are_rewritten_inside(function):
    operands = tuple(t.clone().requires_grad_(function is custom_function) for t in (X, W))
    compiled = same_bits(function, operands)
    assert not compiled.kept
    assert any("." in node.name for node in compiled.nodes), (
        "no matmul inside a subgraph was recorded"
    )


def test_flex_attention_is_kept_and_correct():
    from torch.nn.attention.flex_attention import flex_attention

    def function(query, bias):
        def add_bias(score, b, h, i, j):
            return score + bias[i]

        return flex_attention(query, query, query, score_mod=add_bias)

    query, bias = random(1, 2, 8, 16), random(8)
    compiled = Rewritten(function, HealConfig())
    result = compiled(query, bias)
    plain, exact = function(query, bias), function(query.double(), bias.double())
    assert (result - exact).norm() <= (plain - exact).norm()
    assert list(compiled.kept) == ["flex_attention"]


# -------------------------------------------------------------------------------- torch.func


def in_grad(x, w):
    h = x @ w
    h.add_(1)
    return torch.func.grad(lambda rows: (rows @ w).sum())(h) @ w


def closure_in_grad(x, w):
    h = x @ w
    return torch.func.grad(lambda rows: (rows @ h).sum() + (h @ w).sum() * rows.sum())(x)


def in_vmap(x, w):
    h = x @ w
    return torch.vmap(lambda row: (row @ w).relu() + (h @ w)[0])(h) @ w


def in_jvp(x, w):
    return torch.func.jvp(lambda rows: rows @ w, (x @ w,), (x,))[1] @ w


def in_jacobian(x, w):
    h = x @ w
    return torch.func.jacrev(lambda row: row @ w)(h[0]) @ w, torch.func.jacfwd(lambda r: r @ w)(
        h[0]
    )


def in_vjp(x, w):
    h = x @ w
    result, pull = torch.func.vjp(lambda rows: rows @ w, h)
    return pull(x)[0] @ w, result


TRANSFORMS = (in_grad, closure_in_grad, in_vmap, in_jvp, in_jacobian, in_vjp)


@pytest.mark.parametrize("function", TRANSFORMS, ids=lambda f: f.__name__)
def test_matmuls_inside_a_transform_are_kept_correct_and_listed(function):
    compiled = same_bits(function, (X.clamp(-1, 1), W.clamp(-1, 1)))
    assert all("torch.func" in r or "forward-mode" in r for r in compiled.kept.values())
    assert compiled.kept


def test_tangents_of_forward_mode_are_not_lost():
    from torch.autograd import forward_ad

    def function(x, w):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            return forward_ad.unpack_dual(dual @ w).tangent

    compiled = same_bits(function, (X, W))
    assert "forward-mode" in compiled.kept["matmul"]


# ---------------------------------------------------------------------------------- autocast


class Block(nn.Module):
    """An MLP with attention, FP32 parameters: what autocast is made for."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x):
        h = self.norm(x)
        h = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0]
        return x + self.down(F.gelu(self.up(h)))


def served(block):
    """The block with its matmul weights rounded to BF16, in FP64 and in FP32."""
    rounded = copy.deepcopy(block)
    with torch.no_grad():
        for layer in (rounded.up, rounded.down):
            layer.weight.copy_(layer.weight.bfloat16())
            layer.bias.copy_(layer.bias.bfloat16())
    return copy.deepcopy(rounded).double(), rounded


@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast_rounds_weights_and_not_activations(where):
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 8)

    def inside(x):
        with torch.autocast("cpu", dtype=BF16):
            return block(x)

    if where == "inside":
        result = Rewritten(inside)(x)
    else:
        with torch.autocast("cpu", dtype=BF16):
            result = Rewritten(block)(x)
    wide, single = served(block)
    exact = wide(x.double())
    budget = 2 * (single(x) - exact).abs().max() + 4 * U * exact.abs().max()
    error = (result - exact).abs().max()
    print(f"observed/bound {error / budget:.3f}")
    assert error <= budget
    assert (block(x) - exact).abs().max() > budget, "inverse: unrounded weights must be told apart"


def test_autocast_regions_nest():
    def function(x, w):
        with torch.autocast("cpu", dtype=BF16):
            h = x @ w
            with torch.autocast("cpu", enabled=False):
                wide = h.float() @ w
            again = h @ w
        return h, wide, again

    same_bits(function, (X.float(), nn.Parameter(W.float())))


def test_a_result_narrowed_by_its_operator_alone_keeps_the_callers_dtype():
    """No operand is 16-bit: a dtype argument or autocast is all that rounds."""

    def function(x, kernel):
        with torch.autocast("cpu", dtype=BF16):
            narrow = F.conv1d(x[None], kernel)
        return x.sum(dtype=BF16), torch.cumsum(x, 0, dtype=BF16), narrow

    same_bits(function, (X.float(), W.float()[:, :, None]))


# --------------------------------------------------------------------------------- gradients


def gradients(function, parameters, dtype=None):
    """Gradients of the sum of squares of what `function(*parameters)` returns."""
    leaves = [p.detach().to(dtype or p.dtype).requires_grad_() for p in parameters]
    loss = sum(t.square().sum() for t in flat(function(*leaves)))
    return torch.autograd.grad(loss, leaves)


def rounded_once(function, parameters):
    """Assert that 16-bit gradients are the FP64 ones, rounded once.

    Every FP32 path leaves an error of `2 |fp32 - exact| + 4u |exact|` before rounding; that adds
    at most half a unit in the last place of BF16, 2^-8 of the element.
    """
    compiled = Rewritten(function)
    found = gradients(compiled, parameters)
    exact = gradients(function, parameters, torch.float64)
    single = gradients(function, parameters, FP32)
    for gradient, wanted, wide in zip(found, exact, single, strict=True):
        before = 2 * (wide - wanted).abs().max() + 4 * U * wanted.abs().max()
        budget = before + 2.0**-8 * (wanted.abs() + before)
        ratio = ((gradient - wanted).abs() / budget).max()
        print(f"observed/bound {ratio:.3f}")
        assert gradient.dtype == BF16
        assert ratio <= 1


def test_gradients_of_equal_tokens_add_up_in_fp32():
    tokens = torch.tensor([3] * 200 + [1, 2, 3])

    def function(table, w):
        return F.embedding(tokens, table) @ w

    rounded_once(function, (random(5, 4), random(4, 4)))


def test_gradients_of_tied_weights_add_up_in_fp32():
    tokens = torch.tensor([3, 1, 2, 3])

    def function(table):
        h = torch.tanh(F.embedding(tokens, table))
        return F.linear(h, table), F.linear(h * 2, table)

    table = nn.Parameter(random(5, 4))
    compiled = Rewritten(lambda: function(table))
    (found,) = torch.autograd.grad(sum(t.square().sum() for t in compiled()), [table])
    (exact,) = gradients(function, [table], torch.float64)
    (single,) = gradients(function, [table], FP32)
    before = 2 * (single - exact).abs().max() + 4 * U * exact.abs().max()
    ratio = ((found - exact).abs() / (before + 2.0**-8 * (exact.abs() + before))).max()
    print(f"observed/bound {ratio:.3f}")
    assert ratio <= 1


def test_a_tied_weight_that_is_written_is_read_again():
    table = nn.Parameter(W.clone())

    def function(x):
        before = x @ table
        with torch.no_grad():
            table.add_(1)
        return before, x @ table

    first = Rewritten(function, HealConfig())(X)
    second = (X @ W, X @ (W + 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(table, W + 1)


def test_gradients_through_checkpoint_and_custom_functions():
    def function(x, w):
        h = checkpoint(lambda x, w: torch.tanh(x @ w), x, w, use_reentrant=False)
        return Product.apply(h, w.t())

    compiled = Rewritten(function)
    found, exact = gradients(compiled, (A, B)), gradients(function, (A, B), torch.float64)
    plain = gradients(function, (A, B))
    for gradient, wanted, eager in zip(found, exact, plain, strict=True):
        assert (gradient - wanted).norm() <= (eager - wanted).norm()


def test_a_frozen_weight_gets_no_gradient():
    w = nn.Parameter(B, requires_grad=False)
    x = A.clone().requires_grad_()
    Rewritten(lambda x: (x @ w).square().sum())(x).backward()
    assert w.grad is None
    assert x.grad.dtype == BF16
