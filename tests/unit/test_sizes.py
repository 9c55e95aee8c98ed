"""Sizes that are equal become one symbol, so that the layers of a decoding graph look alike."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

import healpass.backend
from tests.support.bits import differing
from tests.support.tiny_llama import make_llama


@pytest.fixture
def graphs(monkeypatch):
    """The shapes of the inputs of each graph that reaches Inductor; it runs as it is."""
    seen = []

    def keep(graph_module, *_):
        values = [n.meta["example_value"] for n in graph_module.graph.find_nodes(op="placeholder")]
        seen.append([tuple(map(str, x.shape)) for x in values if isinstance(x, torch.Tensor)])
        return graph_module.forward

    monkeypatch.setattr(healpass.backend, "_inductor", keep)
    torch._dynamo.reset()
    return seen


def changing(*shape):
    """A tensor as a compiled graph returns it: with sizes that may be others next time."""
    x = torch.randn(shape)
    x._dynamo_weak_dynamic_indices = set(range(1, len(shape)))
    return x


def both(a, b):
    return torch.cat([a, a @ a.mT], -1).sum(), torch.cat([b, b @ b.mT], -1).sum()


def test_equal_sizes_at_one_place_are_one_symbol(graphs):
    compiled = torch.compile(both, backend="heal", dynamic=True)
    compiled(changing(3, 7, 5), changing(3, 7, 5))
    assert graphs[0][0] == graphs[0][1]
    compiled(changing(3, 9, 6), changing(3, 9, 6))
    assert len(graphs) == 1


def test_sizes_that_part_later_are_compiled_again(graphs):
    compiled = torch.compile(both, backend="heal", dynamic=True)
    compiled(changing(3, 7, 5), changing(3, 7, 5))
    a, b = changing(3, 7, 5), changing(3, 8, 5)
    found, wanted = compiled(a, b), both(a, b)
    assert len(graphs) == 2
    for x, ours, theirs in zip((a, b), found, wanted, strict=True):
        magnitude = x.abs().sum() + (x.abs() @ x.abs().mT).sum()
        terms = x.shape[-1] + x.shape[0] * x.shape[1] * (x.shape[1] + x.shape[2])
        budget = 2 * terms * 2.0**-24 * magnitude  # either sums in FP32, in an order of its own
        print(f"observed/bound {float((ours - theirs).abs() / budget):.3f}")
        assert (ours - theirs).abs() <= budget


def test_another_place_or_rank_is_another_symbol(graphs):
    compiled = torch.compile(lambda a, b: (a @ a.mT, b @ b.mT), backend="heal", dynamic=True)
    compiled(changing(3, 7, 5), changing(3, 5, 7))
    compiled(changing(3, 8, 5), changing(3, 5, 9))
    assert len(graphs) == 1


def test_what_the_user_marked_stands_for_itself(graphs):
    a, b = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    for x in (a, b):
        torch._dynamo.mark_dynamic(x, 1, min=2, max=64)
    torch.compile(both, backend="heal")(a, b)
    assert graphs[0][0][1] != graphs[0][1][1]


def test_the_pass_can_be_switched_off(graphs):
    options = {"debug": {"disable": ("sizes",)}}
    compiled = torch.compile(both, backend="heal", dynamic=True, options=options)
    compiled(changing(3, 7, 5), changing(3, 7, 5))
    assert graphs[0][0] != graphs[0][1]


def decoded(precision, rows, *disable):
    """Logits of a token after a compiled prefill, and the calls of subgraphs in its code."""
    from healpass.integrations.transformers import HealCache

    model = make_llama(num_hidden_layers=4)
    ids = torch.arange(11 * rows).reshape(rows, 11)
    torch._dynamo.reset()
    options = {"precision": precision, "debug": {"disable": disable}}
    compiled = torch.compile(model.forward, backend="heal", dynamic=True, options=options)
    cache = HealCache(config=model.config)
    with torch.no_grad(), fresh_cache():
        compiled(ids, past_key_values=cache)
        result, code = run_and_get_code(lambda: compiled(ids[:, :1], past_key_values=cache).logits)
    return result, sum(text.count("_args)") for text in code)


def test_layers_of_decoding_with_a_growing_cache_are_outlined():
    assert decoded("layercast", 1)[1] > 0


@pytest.mark.deep
@pytest.mark.parametrize(
    ("precision", "rows"), [("layercast", 1), ("layercast", 2), ("heal", 1), ("exact", 2)]
)
def test_they_give_the_same_bits_and_are_not_outlined_without_the_pass(precision, rows):
    (found, calls), (wanted, none) = decoded(precision, rows), decoded(precision, rows, "sizes")
    assert calls > none
    assert differing(found, wanted) == 0
