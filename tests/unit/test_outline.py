"""Repeated layers become calls of one subgraph, and no bit changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx import Graph, GraphModule

import healpass.backend
from healpass.config import HealConfig
from healpass.errors import GraphCheckError
from healpass.graph.passes.outline import outline_repeats
from healpass.graph.passes.outline_repeats import Run, longest_run
from healpass.graph.pipeline import LATE_PASSES, finish
from healpass.lowering.cpu import gemm
from healpass.report import GraphReport
from tests.support.bits import differing
from tests.support.tiny_llama import make_llama

LAYERS = 4


# --------------------------------------------------------------------------- what repeats


@given(
    st.lists(st.integers(0, 9), max_size=30),
    st.lists(st.integers(0, 20), min_size=1, max_size=30),
    st.integers(2, 12),
    st.lists(st.integers(0, 9), max_size=30),
)
def test_what_is_found_repeats_and_what_repeats_is_found(before, body, count, after):
    body = ["layer", *body]  # at least one label that stands in each copy once
    labels = [*before, *body * count, *after]
    run = longest_run(labels)
    assert run is not None
    assert run.saved >= (count - 1) * len(body) - len(body), "one copy may be cut by the phase"
    stretch = labels[run.start : run.stop]
    assert len(stretch) == run.count * run.period + run.rest
    assert stretch[run.period :] == stretch[: -run.period]


@given(st.lists(st.integers(), unique=True))
def test_nothing_is_found_where_nothing_repeats(labels):
    assert longest_run(labels) is None


def test_a_shifted_run_ends_where_it_did():
    run = Run(start=3, period=10, count=4, rest=5)
    assert run.shifted(5) == Run(8, 10, 4, 0)
    assert run.shifted(6) == Run(9, 10, 3, 9)


# --------------------------------------------------------------------------- whole models


def model() -> Any:
    return make_llama(num_hidden_layers=LAYERS)


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.arange(rows * length).reshape(rows, length) % 97


def code_of(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result, and the code that Inductor wrote for it."""
    torch._dynamo.reset()
    with fresh_cache():
        return run_and_get_code(torch.compile(function, backend="heal", options=options), *args)


def calls(code: list[str]) -> list[int]:
    """How often each subgraph is called."""
    text = "\n".join(code)
    names = re.findall(r"def (repeated_\d+)\(args\)", text)
    return [len(re.findall(rf"= {name}\({name}_args\)", text)) for name in names]


@pytest.mark.deep
def test_layers_are_compiled_once_and_exact_gives_the_same_bits():
    network = model()

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return network(ids, use_cache=False).logits

    ours, code = code_of(logits, tokens(), precision="exact")
    plain, written_out = code_of(
        logits, tokens(), precision="exact", debug={"disable": ("outline",)}
    )
    assert sum(calls(code)) >= LAYERS - 2, "the first and the last may differ from the rest"
    assert calls(written_out) == []
    assert len("".join(code)) < len("".join(written_out))
    assert differing(ours, plain) == 0


class Block(torch.nn.Module):
    """A layer without attention, which compiles quickly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def blocks() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block() for _ in range(LAYERS)))


class LongBlock(Block):
    """Long enough to be outlined before its exact operators are opened."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for shift in range(12):
            x = (x + shift) * 0.5
        return x


def test_lengths_may_be_symbols():
    network = torch.nn.Sequential(*(LongBlock() for _ in range(LAYERS)))

    def run(*disable: str) -> list[Tensor]:
        torch._dynamo.reset()
        options = {"precision": "exact", "debug": {"disable": disable}}
        compiled = torch.compile(network, backend="heal", dynamic=True, options=options)
        with torch.no_grad(), fresh_cache():
            first, code = run_and_get_code(compiled, torch.ones(5, 8))
            assert len(calls(code)) == (0 if disable else 1)
            return [first, compiled(torch.arange(72.0).reshape(9, 8))]

    assert differing(run(), run("outline")) == 0


def gradients(network: Any, inputs: Tensor, **options: Any) -> tuple[list[Tensor], list[str]]:
    """The loss and the gradients of a training step, and the code."""
    parameters = list(network.parameters())

    def step(compiled: Any) -> Tensor:
        loss = compiled(inputs).square().sum()
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    torch._dynamo.reset()
    with fresh_cache():
        return run_and_get_code(step, torch.compile(network, backend="heal", options=options))


def assert_same_steps(network: Any, inputs: Tensor) -> None:
    """Compare a training step with layers outlined and without."""
    (ours, code), (plain, _) = (
        gradients(network, inputs, precision="exact", debug={"disable": disable})
        for disable in ((), ("outline",))
    )
    assert len(calls(code)) >= 2, "the forward's and the backward's"
    assert differing(ours, plain) == 0


def test_a_training_step_in_exact_has_the_same_bits(monkeypatch):
    """With products decomposed, as without VNNI: a forward of kernels is too small to outline."""
    monkeypatch.setattr(gemm, "has_vnni", lambda: False)
    assert_same_steps(blocks(), torch.randn(3, 8))


@pytest.mark.deep
def test_a_training_step_of_a_llama_in_exact_has_the_same_bits():
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = model().train()

        def forward(self, ids: Tensor) -> Tensor:
            return self.llama(ids, use_cache=False).logits

    assert_same_steps(Logits(), tokens())


def test_a_static_cache_is_written_in_place_outside():
    import transformers

    def decoded(*disable: str) -> tuple[list[Tensor], list[str]]:
        network = model()
        cache = transformers.StaticCache(network.config, max_cache_len=16)

        @torch.no_grad()
        def step(ids: Tensor, position: Tensor) -> Tensor:
            return network(ids, past_key_values=cache, cache_position=position).logits

        step(tokens(1, 4), torch.arange(4))  # eagerly
        logits, code = code_of(step, tokens(1, 1), torch.tensor([4]), debug={"disable": disable})
        states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        return [logits, *states], code

    (ours, code), (plain, _) = decoded(), decoded("outline")
    assert sum(calls(code)) >= LAYERS - 2
    assert differing(ours, plain) == 0


# --------------------------------------------------------------------------- single graphs


def traced(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """ATen nodes with fake values, as Inductor's passes get them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake")(*inputs)


def outlined(graph: Graph) -> list[str]:
    """The subgraphs that are called, in order."""
    outline_repeats(graph)
    graph.lint()
    target = torch.ops.higher_order.invoke_subgraph
    return [node.args[1] for node in graph.nodes if node.target is target]


def chain(x: Tensor, step: Callable[[Tensor, int], Tensor], times: int = 6) -> Tensor:
    """A layer of thirty-two nodes and `step`, so many times."""
    for index in range(times):
        for _ in range(8):
            x = torch.sin(x * 2) + torch.cos(x)
        x = step(x, index)
    return x


def agrees(function: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """The subgraphs called, after a check that results did not change."""
    graph_module = traced(function, *inputs)
    expected = graph_module(*(x.clone() for x in inputs))
    found = outlined(graph_module.graph)
    graph_module.recompile()
    assert differing(graph_module(*(x.clone() for x in inputs)), expected) == 0
    return found


def test_a_chain_of_equal_layers_is_outlined():
    found = agrees(lambda x: chain(x, lambda y, _: y + 1), torch.randn(4, 4))
    assert set(found) == {"repeated_0"}
    assert len(found) >= 5, "all six, or one less where the cut is elsewhere"


def test_short_pieces_are_left_to_be_fused():
    assert agrees(lambda x: chain(x, lambda y, _: y, times=1), torch.randn(4, 4)) == []


def test_a_layer_that_is_wired_otherwise_stays():
    def step(x: Tensor, index: int) -> Tensor:
        return x - x.exp() if index != 2 else x.exp() - x

    found = agrees(lambda x: chain(x, step), torch.randn(4, 4))
    assert 0 < len(found) < 6


def test_other_numbers_make_another_layer():
    assert (
        agrees(lambda x: chain(x, lambda y, i: y * (i + 2), times=2), torch.randn(4))
        != ["repeated_0"] * 2
    )


@pytest.mark.parametrize(
    "step",
    [
        lambda x, _: x + torch.rand_like(x),
        lambda x, _: torch.index_copy(x, 0, torch.tensor([1]), x[:1]),
        lambda x, _: torch.scatter(x, 0, torch.zeros(1, 4, dtype=torch.int64), x),
    ],
    ids=["random", "index_copy", "scatter"],
)
def test_what_writes_or_draws_stays_outside(step):
    graph_module = traced(lambda x: chain(x, step), torch.randn(4, 4))
    names = set(outlined(graph_module.graph))
    assert names
    graphs = [getattr(graph_module, name).graph for name in names]
    inside = {str(n.target) for g in graphs for n in g.nodes if n.op == "call_function"}
    assert not [target for target in inside if re.search("rand|copy|scatter", target)]


def test_a_view_that_is_read_outside_is_taken_there():
    def function(x: Tensor) -> tuple[Tensor, ...]:
        views: list[Tensor] = []

        def step(y: Tensor, _: int) -> Tensor:
            views.append(y.t()[1:])
            return y

        return (chain(x, step), *views)

    graph_module = traced(function, torch.randn(4, 4))
    expected = graph_module(torch.ones(4, 4))
    assert outlined(graph_module.graph)
    graph_module.recompile()
    assert all(map(torch.equal, graph_module(torch.ones(4, 4)), expected))
    subgraph = graph_module.repeated_0.graph
    assert not [
        n for n in subgraph.nodes if "slice" in str(n.target) or "aten.t." in str(n.target)
    ]


def test_the_check_sees_a_pass_that_outlines_what_differs(monkeypatch):
    """The inverse: copies that are wired otherwise, called as if they were not."""
    from healpass.graph.passes import outline

    honest = outline._copy
    monkeypatch.setattr(
        outline, "_copy", lambda nodes: outline.Copy(nodes, honest(nodes).operands, "all alike")
    )

    def step(x: Tensor, index: int) -> Tensor:
        return x - x.exp() if index != 2 else x.exp() - x

    with pytest.raises(AssertionError):
        agrees(lambda x: chain(x, step), torch.randn(4, 4))


def repeated_graph() -> Graph:
    return traced(lambda x: chain(x, lambda y, _: y + 1), torch.randn(4, 4)).graph


def test_late_passes_have_a_record_an_artifact_and_a_check_as_the_others_have(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "healpass.graph.pipeline.torch._logging.trace_structured",
        lambda _, metadata_fn, payload_fn: seen.append((metadata_fn()["name"], payload_fn())),
    )
    report = GraphReport()
    finish(graph := repeated_graph(), HealConfig(), {}, report)
    (record,) = report.passes
    calls_made = graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.invoke_subgraph
    )
    assert (record["name"], record["changed"]) == ("outline", len(calls_made))
    assert [name for name, _ in seen] == ["heal_before_outline", "heal_after_outline"]
    assert "invoke_subgraph" in seen[1][1]
    report = GraphReport()
    finish(repeated_graph(), HealConfig(precision="exact"), {}, report)
    assert [record["name"] for record in report.passes] == list(LATE_PASSES)
    off = HealConfig(precision="exact", debug={"disable": ("outline", "decompose")})
    finish(repeated_graph(), off, {}, report := GraphReport())
    assert report.passes == []


def test_a_constant_in_the_middle_of_a_layer_is_passed_to_its_call():
    """Such as freezing makes: the call comes first, and Inductor sorts what comes late."""
    constants = [torch.full((4, 4), 1.0 + index) for index in range(6)]

    def layer(given: tuple[Tensor, ...]) -> Callable[[Tensor, int], Tensor]:
        return lambda x, index: torch.cos(x * given[index])

    owner = traced(lambda x, *given: chain(x, layer(given)), torch.randn(4, 4), *constants)
    graph = owner.graph
    for index, node in enumerate(graph.find_nodes(op="placeholder")[1:]):
        owner.register_buffer(f"constant_{index}", constants[index])
        with graph.inserting_before(next(iter(node.users))):
            constant = graph.get_attr(f"constant_{index}")
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
        graph.erase_node(node)
    finish(graph, HealConfig(), {}, GraphReport())
    graph.lint()
    assert graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)


def test_a_late_pass_that_leaves_a_value_unknown_is_caught(monkeypatch):
    def forgetful(graph, _):
        node = graph.output_node()
        with graph.inserting_before(node):
            made = graph.call_function(torch.ops.aten.neg.default, (node.all_input_nodes[0],))
        node.replace_input_with(node.all_input_nodes[0], made)
        return 1

    monkeypatch.setitem(LATE_PASSES, "outline", forgetful)
    with pytest.raises(GraphCheckError, match=r"outline.*no value"):
        finish(repeated_graph(), HealConfig(), {}, GraphReport())


def test_the_pass_is_the_backends():
    patches = healpass.backend.inductor_patches(healpass.HealConfig())
    graph = repeated_graph()
    patches["post_grad_custom_post_pass"](graph)
    assert graph.find_nodes(op="get_attr")
    off = healpass.backend.inductor_patches(healpass.HealConfig(debug={"disable": ("outline",)}))
    graph = repeated_graph()
    off["post_grad_custom_post_pass"](graph)
    assert not graph.find_nodes(op="get_attr")
