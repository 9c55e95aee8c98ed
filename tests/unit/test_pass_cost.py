"""What the passes cost: time in proportion to the nodes, whatever the precision."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

from healpass.config import HealConfig
from healpass.graph.pipeline import rewrite

#: Nodes of a large graph: more than a language model of 100 layers has.
LARGE = 10_000
#: A smaller graph to compare with. Of a pass that is quadratic, the time per node grows as much.
PART = 4
WIDTH = 16

Pass = Callable[[GraphModule], object]


def block(x: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """A part of a language model: attention without projections, and a feed-forward layer."""
    heads = F.rms_norm(x, (WIDTH,), scale).view(1, -1, 2, WIDTH // 2).transpose(1, 2)
    attended = F.scaled_dot_product_attention(heads, heads, heads)
    x = x + attended.transpose(1, 2).reshape(x.shape)
    hidden = F.silu(F.linear(F.rms_norm(x, (WIDTH,), scale), up))
    return x + F.linear(hidden, down).to(x.dtype)


@pytest.fixture(scope="module")
def captured() -> GraphModule:
    """One block as Dynamo traces it."""
    graphs: list[GraphModule] = []

    def catch(graph_module: GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph_module)
        return graph_module.forward

    half = [
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        for shape in ((1, 3, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (WIDTH,))
    ]
    with torch.no_grad():
        torch.compile(block, backend=catch)(*half)
    return graphs[0]


def repeated(captured: GraphModule, nodes: int) -> GraphModule:
    """The block as often as it takes to have so many nodes, one after the other."""
    graph, env = Graph(), {}
    for node in captured.graph.find_nodes(op="placeholder"):
        env[node] = graph.node_copy(node)
    first, *_ = env
    while len(graph.nodes) < nodes:
        for node in captured.graph.nodes:
            if node.op not in ("placeholder", "output"):
                env[node] = graph.node_copy(node, env.__getitem__)
            elif node.op == "output":
                env[first] = env[node.args[0][0]]
    graph.output((env[first],))
    return GraphModule(torch.nn.Module(), graph)


def seconds(run: Pass, graph_module: GraphModule) -> float:
    """Processor time of this thread: others may be working here."""
    start = time.thread_time()
    run(graph_module)
    return time.thread_time() - start


def growth(run: Pass, captured: GraphModule) -> float:
    """Time per node of a large graph over that of a part of it."""
    small, large = (repeated(captured, count) for count in (LARGE // PART, LARGE))
    run(repeated(captured, 1))  # what is imported or cached at first
    return seconds(run, large) / seconds(run, small) / PART


@pytest.mark.parametrize("precision", ["heal", "layercast", "exact"])
def test_the_passes_take_time_in_proportion_to_the_nodes(precision, captured):
    config = HealConfig(precision=precision)
    found = growth(lambda graph_module: rewrite(graph_module, config), captured)
    print(f"time per node, {LARGE} nodes over {LARGE // PART}: {found:.2f}")
    assert found < PART**0.5


def test_the_measure_sees_a_pass_that_is_quadratic(captured):
    def pairs(graph_module: GraphModule) -> None:
        for node in graph_module.graph.nodes:
            for _ in graph_module.graph.nodes:
                node.next  # noqa: B018

    assert growth(pairs, captured) > PART**0.5


def test_ten_thousand_nodes_take_less_than_ten_seconds(captured):
    large = repeated(captured, LARGE)
    report = rewrite(large, HealConfig())
    total = sum(part["seconds"] for part in report.passes)
    print({part["name"]: round(part["seconds"], 3) for part in report.passes})
    assert report.nodes
    assert not report.kept
    assert total < 10
