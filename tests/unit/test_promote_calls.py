"""Subgraphs that several calls share, loops, and the check of what passes their borders.

`against_torch` explains the accuracy check: an FP32 bound against FP64. Run by plain torch,
through AOTAutograd where gradients are taken; `integration/test_regions_and_recurrences.py`
compiles.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

from healpass.config import HealConfig
from healpass.errors import GraphCheckError
from healpass.graph import borders
from healpass.graph.nodes import subgraphs
from healpass.graph.passes import promote_calls
from tests.support.against_torch import BF16, U, as_accurate_as_fp32, random
from tests.support.rewriting import Rewritten
from tests.support.versions import AT_2_11

A, B = random(6, 6), random(6, 6, seed=1) / 2


@torch.compiler.nested_compile_region
def region(x, w):
    return torch.tanh(x @ w)


@torch.compiler.nested_compile_region
def nest(x, w):
    return region(region(x, w) * 2, w)


@torch.compiler.nested_compile_region
def looped(x, w):
    return scan(lambda c, r: (torch.tanh(c @ w + r), c * 2), x[0] * 1, x)[1] @ w


@torch.compiler.nested_compile_region
def branched(x, w):
    return torch.cond(x.sum() > -1e9, lambda h: torch.tanh(h @ w), lambda h: h * 2, (x,))


@torch.compiler.nested_compile_region
def recomputed(x, w):
    return checkpoint(lambda x: torch.tanh(x @ w), x, use_reentrant=False)


def called_twice(x, w):
    return region(region(x, w), w)


def called_from_two_graphs(x, w):
    return region(nest(x, w), w) + nest(region(x @ w, w), w)


def with_a_loop_inside(x, w):
    return looped(looped(x, w), w)


def with_branches_inside(x, w):
    return branched(branched(x, w), w)


def with_a_checkpoint_inside(x, w):
    return recomputed(recomputed(x, w), w)


def inside_a_checkpoint(x, w):
    return checkpoint(lambda h: region(region(h, w), w), region(x, w), use_reentrant=False)


def inside_branches(x, w):
    there, here = (lambda h: region(h, w)), (lambda h: region(h * 2, w))
    return torch.cond(x.sum() > -1e9, there, here, (region(x, w),))


SHARED = (
    called_twice,
    called_from_two_graphs,
    with_a_loop_inside,
    with_branches_inside,
    with_a_checkpoint_inside,
    inside_a_checkpoint,
    inside_branches,
)


#: What torch 2.11 does not compile by itself: without gradients, and with them.
FAILING_AT_2_11 = {False: (inside_branches,), True: (called_from_two_graphs, with_a_loop_inside)}


def skip_where_torch_fails(function, gradients=False):
    if AT_2_11 and function in FAILING_AT_2_11[gradients]:
        plain = torch.compile(function, backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception):  # noqa: B017, PT011  each fails in its own way
            plain(A, B.clone().requires_grad_(gradients))
        pytest.skip("torch 2.11 does not compile it, either")


@pytest.mark.parametrize("function", SHARED, ids=lambda f: f.__name__)
def test_a_shared_subgraph_gets_what_it_was_promoted_for(function):
    skip_where_torch_fails(function)
    compiled = as_accurate_as_fp32(function, (A, B))
    assert not compiled.kept


@pytest.mark.parametrize("function", SHARED, ids=lambda f: f.__name__)
def test_gradients_pass_through_a_shared_subgraph(function):
    """Of a weight in BF16: the FP64 gradient rounded once, and FP32's own error before that."""
    skip_where_torch_fails(function, gradients=True)

    def gradient(run, dtype):
        w = torch.nn.Parameter(B.detach().to(dtype))
        (found,) = torch.autograd.grad(run(A.to(dtype), w).square().sum(), [w])
        return found.double()

    compiled = Rewritten(function, aot=True)
    exact, single = (gradient(function, dtype) for dtype in (torch.float64, torch.float32))
    before = 2 * (single - exact).abs().max() + 4 * U * exact.abs().max()
    budget = before + 2.0**-8 * (exact.abs() + before)
    ratio = float(((gradient(compiled, BF16) - exact).abs() / budget).max())
    print(f"observed/bound {ratio:.3f}")
    assert ratio <= 1


def test_calls_of_one_kind_share_a_copy():
    def function(x, w):
        for _ in range(4):
            x = region(x, w)
        return x

    compiled = as_accurate_as_fp32(function, (A, B))
    assert len(list(subgraphs(compiled.graphs[0]))) == 2  # of 16 bits, and of FP32


# ------------------------------------------------------------------------- the check, inverted


def test_one_copy_for_all_calls_is_caught():
    """The fault that gave NaN: the first call's copy serves calls that hand in another dtype."""
    with (
        mock.patch.object(promote_calls, "_form", return_value=None),
        pytest.raises(
            Exception, match=r"its body takes bfloat16\[6, 6\] where the call has float32"
        ),
    ):
        Rewritten(called_twice)(A, B)


def test_one_name_for_two_copies_is_caught():
    """The other half of that fault: torch compiles one body per name."""
    with (
        mock.patch.object(promote_calls, "_unused", lambda name, _: name),
        pytest.raises(Exception, match="two subgraphs have the name"),
    ):
        Rewritten(called_twice)(A, B)


def widened_carry(x, w):
    h = x @ w
    return scan(lambda c, r: (torch.tanh(c @ w + r), c * 2), h[0], h)[0]


def loop(x, w):
    first = torch.zeros((), dtype=torch.int64)
    step = lambda i, h: (i + 1, torch.tanh(h @ w))  # noqa: E731
    return while_loop(lambda i, _: i < 3, step, (first, x @ w))[1] @ w


def branches(x, w):
    return torch.cond(x.sum() > 0, lambda h: h @ w, lambda _: w.clone(), (x @ w,)) @ w


def rows(x, w):
    return map_rows(lambda row, w: torch.tanh(row @ w), x @ w, w) @ w


@pytest.mark.parametrize(
    "function", [widened_carry, loop, branches, rows], ids=lambda f: f.__name__
)
def test_loops_and_branches_are_as_accurate_as_fp32(function):
    compiled = as_accurate_as_fp32(function, (A, B))
    assert not compiled.kept


@pytest.mark.parametrize("function", [widened_carry, loop, branches], ids=lambda f: f.__name__)
def test_a_body_that_gives_another_dtype_than_its_call_expects_is_caught(function):
    with (
        mock.patch.object(promote_calls, "_widen_outputs", return_value=None),
        pytest.raises(Exception, match="its body gives bfloat16"),
    ):
        Rewritten(narrowing(function))(A, B)


def narrowing(function):
    """The function with a step, or a branch, that hands out a 16-bit input as it is."""

    def carried(x, w):
        return scan(lambda _, r: (w[0].clone(), r * 2), (x @ w)[0], x @ w)[0]

    def stepped(x, w):
        first = torch.zeros((), dtype=torch.int64)
        return while_loop(lambda i, _: i < 3, lambda i, _: (i + 1, w.clone()), (first, x @ w))[1]

    return {widened_carry: carried, loop: stepped, branches: branches}[function]


def test_facts_tell_dtypes_ranks_devices_and_sizes_apart():
    fact = borders.fact(torch.zeros(2, 3))
    others = (
        torch.zeros(2, 3).double(),
        torch.zeros(2, 3, 1),
        torch.zeros(2, 4),
        torch.zeros(2, 3, device="meta"),
    )
    assert fact.agrees(borders.fact(torch.ones(2, 3)))
    assert fact.row().agrees(borders.fact(torch.ones(3)))
    assert not any(fact.agrees(borders.fact(other)) for other in others)


# ------------------------------------------------------------------------------ torch.func

TRANSFORMS = {
    "vmap": lambda x, w: torch.vmap(lambda row: torch.softmax(torch.tanh(row @ w), -1))(x @ w),
    "per-sample gradients": lambda x, w: torch.vmap(
        torch.func.grad(lambda w, row: torch.tanh(row @ w).square().mean()), (None, 0)
    )(w, x),
    "jacrev": lambda x, w: torch.func.jacrev(lambda row: torch.softmax(row @ w, -1))(x[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("precision", ["heal", "exact"])
def test_transforms_run_and_are_listed(name, precision):
    """They run as traced, so their error is BF16's; that it is not more is what is checked."""
    function = TRANSFORMS[name]
    compiled = Rewritten(function, HealConfig(precision=precision))
    exact, plain = function(A.double(), B.double()), function(A, B)
    error = (compiled(A, B).double() - exact).norm()
    budget = 2 * (plain.double() - exact).norm() + 2.0**-8 * exact.norm()
    print(f"observed/bound {error / budget:.3f}")
    assert error <= budget
    assert any("torch.func" in reason for reason in compiled.kept.values())


def test_an_exact_scan_that_is_trained_is_refused():
    from healpass.errors import UnavailableError

    w = B.clone().requires_grad_()
    with pytest.raises(Exception, match="a scan that is trained") as caught:
        Rewritten(widened_carry, HealConfig(precision="exact"))(A, w)
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, UnavailableError)


def test_the_check_raises_its_own_error():
    """torch wraps what a backend raises; what it wraps is GraphCheckError."""
    with (
        mock.patch.object(promote_calls, "_unused", lambda name, _: name),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught,
    ):
        Rewritten(called_twice)(A, B)
    assert isinstance(caught.value.inner_exception, GraphCheckError)
