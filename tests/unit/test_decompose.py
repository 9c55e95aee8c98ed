"""Exact operators are opened after outlining, with the same bits, and only without a backward."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import healpass.backend
from healpass import lowering
from healpass.graph.passes.decompose import decompose_operators, stays_whole
from tests.support.bits import SPECIAL, differing

heal = torch.ops.heal
TABLE = select_decomp_table() | lowering.decompositions()


def traced(function: Any, *inputs: Tensor) -> Any:
    """ATen nodes with our operators closed, on fake tensors, as Inductor's passes get them."""
    table = {op: how for op, how in TABLE.items() if op.namespace != "heal"}
    return make_fx(function, decomposition_table=table, tracing_mode="fake")(*inputs)


def ours(graph_module: Any) -> list[str]:
    return [n.name for n in graph_module.graph.nodes if str(n.target).startswith("heal.")]


FUNCTIONS = {
    "exp": heal.exp.default,
    "silu": heal.silu.default,
    "sum": lambda x: heal.sum(x, [-1], True),
    "twice": lambda x: heal.tanh(heal.tanh(x)) + heal.tanh(x),
    # As it lies here; the other way processors with VNNI have a kernel, and it stays whole.
    "mm": lambda x: heal.mm(x, x.t().contiguous().bfloat16(), "exact5"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_opened_graph_has_the_bits_of_the_operators(name):
    x = SPECIAL.clone() if name not in ("sum", "mm") else torch.linspace(-3, 5, 77).reshape(7, 11)
    graph_module = traced(FUNCTIONS[name], x)
    assert ours(graph_module)
    decompose_operators(graph_module.graph, TABLE)
    graph_module.graph.lint()
    graph_module.recompile()
    left = {name for name in ours(graph_module) if not name.startswith("with_special")}
    assert not left
    assert differing(graph_module(x), FUNCTIONS[name](x)) == 0


def test_a_decomposition_that_declines_leaves_the_operator():
    x = torch.ones(3, 4)
    graph_module = traced(lambda a: heal.mm(a, a.t(), "layercast"), x)
    decompose_operators(graph_module.graph, TABLE)
    assert ours(graph_module) == ["mm"]


def test_a_constant_of_a_decomposition_comes_along():
    table = {**TABLE, heal.exp.default: lambda x: x + torch.tensor([1.0, 2.0])}
    x = torch.zeros(2)
    graph_module = traced(lambda a: heal.exp(heal.exp(a)), x)
    decompose_operators(graph_module.graph, table)
    graph_module.recompile()
    assert graph_module(x).tolist() == [2.0, 4.0]


def test_an_operator_with_several_results_is_opened():
    table = {**TABLE, heal.rms_norm_backward.default: lambda x, *_: (x + 1, x + 2)}
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    with torch._subclasses.FakeTensorMode() as mode:
        x.meta["val"] = mode.from_tensor(torch.zeros(2, 3))
    call = graph.call_function(heal.rms_norm_backward.default, (x, x, [3], None, 1e-5))
    taken = [graph.call_function(operator.getitem, (call, index)) for index in (1, 0)]
    graph.output(tuple(taken))
    graph_module = torch.fx.GraphModule(nn.Module(), graph)
    decompose_operators(graph_module.graph, table)
    graph_module.recompile()
    assert [y.unique().item() for y in graph_module(torch.zeros(2, 3))] == [2.0, 1.0]


def test_subgraphs_are_opened_too():
    inner = traced(heal.exp.default, torch.ones(3))
    outer = nn.Module()
    outer.add_module("repeated_0", inner)
    graph = torch.fx.Graph(torch.fx.GraphModule(outer, torch.fx.Graph()))
    graph.get_attr("repeated_0")
    owner = torch.fx.GraphModule(outer, graph)
    decompose_operators(owner.graph, TABLE)
    assert ours(owner.repeated_0) == []


@pytest.mark.parametrize(
    ("needs", "enabled", "closed"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_operators_stay_closed_where_nothing_is_differentiated(needs, enabled, closed):
    with torch.set_grad_enabled(enabled):
        assert stays_whole([3, torch.ones(2, requires_grad=needs)]) == closed


@pytest.mark.parametrize("training", [False, True])
def test_what_aot_sees(training, monkeypatch):
    seen = []
    finish = healpass.backend._finish
    monkeypatch.setattr(
        healpass.backend,
        "_finish",
        lambda c, report, graph: seen.append(ours(_Of(graph))) or finish(c, report, graph),
    )
    torch._dynamo.reset()
    x = torch.randn(3, 5, requires_grad=training)
    function = torch.compile(
        lambda x: torch.nn.functional.silu(x).exp(), backend="heal", options={"precision": "exact"}
    )
    with torch._inductor.utils.fresh_cache():
        found = function(x)
    assert differing(found.detach(), heal.exp(heal.silu(x)).detach()) == 0
    assert bool(seen[0]) is not training


class _Of:
    def __init__(self, graph):
        self.graph = graph
