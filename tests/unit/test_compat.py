"""What differs between the versions of torch: one place for each difference, the same result."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from torch._inductor import ir
from torch.fx import Graph

from healpass.graph.nodes import op_name
from healpass.lowering import compat
from healpass.ops.attention.scoring import Scoring
from tests.support import exact_gpu, interpreter
from tests.support.bits import differing
from tests.support.fake_cuda import generated_source

heal = torch.ops.heal

# ---------------------------------------------------------------------------------------- graphs


def named(name):
    def function(*args):
        return args

    function.__name__, function.__module__ = name, "torch._dynamo.variables.tensor"
    return function


@pytest.mark.parametrize(
    ("traced", "today"),
    [
        (torch.Tensor.__eq__, "eq"),
        (operator.eq, "eq"),
        (named("prim from_local"), "from_local"),
        (named("prim_redistribute"), "redistribute"),
        (named("prim_to_local"), "to_local"),
        (named("to_local"), "to_local"),
    ],
)
def test_an_operator_has_one_name_in_the_graphs_of_every_torch(traced, today):
    graph = Graph()
    assert op_name(graph.call_function(traced, (graph.placeholder("x"),))) == today


def test_a_method_has_one_name_too():
    graph = Graph()
    assert op_name(graph.call_method("__ge__", (graph.placeholder("x"), 1))) == "ge"


# -------------------------------------------------------------------------------------- Inductor


def test_what_a_view_looks_at_is_settled_and_the_view_keeps_its_strides():
    cpu = torch.device("cpu")
    memory = ir.Buffer(name="memory", layout=ir.FlexibleLayout(cpu, torch.float32, [6]))
    layout = ir.FixedLayout(cpu, torch.float32, [4, 2, 6], [0, 0, 1])
    view = ir.ReinterpretView(data=ir.StorageBox(memory), layout=layout)
    compat.fix_base(memory)
    assert isinstance(memory.layout, ir.FlexibleLayout), "that of the kernel's own input is later"
    compat.fix_base(view)
    assert isinstance(memory.layout, ir.FixedLayout)
    assert view.get_stride() == [0, 0, 1]


def turned(*states):
    """Computed in one order of dimensions, attended in another."""
    return [(x * 2).transpose(1, 2) for x in states]


SCORING = Scoring(0.25, is_causal=True).arguments
STATES = [torch.randn(2, 20, 3, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
MASK = torch.randn(20, 20, generator=torch.Generator().manual_seed(3))


def attended(query, key, value):
    return (heal.attention(*turned(query, key, value), *SCORING, "heal")[0],)


def attended_with_a_mask(query, key, value, mask):
    scoring = Scoring(0.25, (mask * 2).masked_fill(mask > 1, -math.inf)).arguments
    return (heal.attention(*turned(query, key, value), *scoring, "heal")[0],)


def multiplied(a, b):
    return (heal.mm((a * 2).half(), (b * 3).half().t(), "heal"),)


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (attended, STATES),
        (attended_with_a_mask, [*STATES, MASK]),
        (multiplied, [MASK, MASK + 1]),
    ],
    ids=["attention", "mask", "product"],
)
def test_templates_read_computed_views_where_they_lie(function, tensors):
    (found,) = interpreter.run(generated_source(function, tensors), *tensors)
    (wanted,) = function(*tensors)
    assert (found - wanted).norm() <= 2.0**-20 * wanted.norm()


def attended_exactly(query, key, value, mask):
    states = [p for x in turned(query, key, value) for p in heal.quantize(x, "int16")]
    scoring = Scoring(0.25, (mask * 2).masked_fill(mask > 1, -math.inf)).arguments
    return (heal.integer_attention(*states, *scoring, "exact5")[0],)


def attended_exactly_under_a_computed_view(query, key, value, mask):
    states = [p for x in turned(query, key, value) for p in heal.quantize(x, "int16")]
    visible = torch.logical_and(mask < 1, mask > -1).view(1, 1, 20, 20).expand(2, -1, -1, -1)
    scoring = Scoring(0.25, visible).arguments
    return (heal.integer_attention(*states, *scoring, "exact5")[0],)


@pytest.mark.parametrize("attend", [attended_exactly, attended_exactly_under_a_computed_view])
def test_exact_templates_read_computed_views_where_they_lie(attend):
    tensors = [*STATES, MASK]
    (found,) = exact_gpu.run(attend, tensors)
    assert differing(found, attend(*tensors)[0]) == 0
