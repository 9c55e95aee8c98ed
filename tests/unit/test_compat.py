"""What differs between the versions of torch: one place for each difference, the same result."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph

from healpass.graph.nodes import op_name


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
