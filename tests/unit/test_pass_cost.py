"""What the passes cost: time in proportion to the nodes."""

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

#: Nodes of a large graph: a language model of about fifty layers.
LARGE = 4_000
#: A smaller graph to compare with. Of a pass that is quadratic, the time per node grows as much.
PART = 4
WIDTH = 16

Pass = Callable[[GraphModule], object]


def norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm as transformers writes it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return scale * wide.to(x.dtype)


def heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A projection, cut into heads and rotated by position."""
    x = F.linear(x, weight).view(*x.shape[:-1], 2, WIDTH // 2).transpose(1, 2)
    left, right = x[..., : WIDTH // 4], x[..., WIDTH // 4 :]
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def block(x: Tensor, up: Tensor, down: Tensor, square: Tensor, scale: Tensor, cos: Tensor):
    """One layer of a language model; the shapes decide, so some weights stand for several."""
    normed = norm(x, scale)
    query, key, value = (heads(normed, square, cos, cos) for _ in range(3))
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    x = x + F.linear(attended.transpose(1, 2).reshape(x.shape), square)
    normed = norm(x, scale)
    return x + F.linear(F.silu(F.linear(normed, up)) * F.linear(normed, up), down)


@pytest.fixture(scope="module")
def captured() -> GraphModule:
    """One layer as Dynamo traces it."""
    graphs: list[GraphModule] = []

    def catch(graph_module: GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph_module)
        return graph_module.forward

    shapes = (
        (1, 3, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (WIDTH, WIDTH), (WIDTH,),
        (3, WIDTH // 2),
    )  # fmt: skip
    with torch.no_grad():
        torch.compile(block, backend=catch)(*(torch.ones(s).to(torch.bfloat16) for s in shapes))
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


@pytest.mark.deep
@pytest.mark.parametrize("precision", ["heal", "layercast"])
def test_the_passes_take_time_in_proportion_to_the_nodes(precision, captured):
    config = HealConfig(precision=precision)
    found = growth(lambda graph_module: rewrite(graph_module, config), captured)
    print(f"time per node, {LARGE} nodes over {LARGE // PART}: {found:.2f}")
    assert found < PART**0.5


@pytest.mark.deep
@pytest.mark.parametrize("precision", ["heal", "layercast"])
def test_ten_thousand_nodes_take_less_than_ten_seconds(precision, captured):
    """By the clocks of the passes: what pytest does with logged graphs is not counted."""
    report = rewrite(repeated(captured, 10_000), HealConfig(precision=precision))
    found = sum(entry["seconds"] for entry in report.passes)
    print(f"{precision}: {found:.2f} s")
    assert found < 10


@pytest.mark.deep
def test_the_measure_sees_a_pass_that_is_quadratic(captured):
    def pairs(graph_module: GraphModule) -> None:
        for node in graph_module.graph.nodes:
            for _ in graph_module.graph.nodes:
                node.next  # noqa: B018

    assert growth(pairs, captured) > PART**0.5
