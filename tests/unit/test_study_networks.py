"""One captured graph serves all configurations of a model, with the bits of a model of its own."""

from __future__ import annotations

import pytest
import torch

from healpass.errors import StudyError
from healpass.study.plan.configuration import Configuration, Unit
from healpass.study.run import interpret as interpreting
from healpass.study.run.generate import generate
from healpass.study.run.networks import build, key_of, strict_dynamo
from healpass.study.run.score import Text, score
from tests.support.tiny_llama import make_llama

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13, 14]]
TEXTS = [Text(tuple(p), (3, 1, 4, 1, 5)) for p in PROMPTS]


class Tiny:
    """Stands for a checkpoint: the same small model each time."""

    def model(self, dtype):
        return make_llama(getattr(torch, dtype)).eval()


class Tokens:
    pad_token_id, eos_token_id = 0, None


@pytest.fixture
def captures(monkeypatch):
    """Counts what Dynamo hands over."""
    counted = []
    rewritten = interpreting._rewritten
    monkeypatch.setattr(
        interpreting, "_rewritten", lambda *given: counted.append(given[0]) or rewritten(*given)
    )
    return counted


def scored(network):
    return [s.digest for s in score(network.model, TEXTS, padding_id=0)]


def generated(network, chunk):
    return generate(network.model, Tokens(), PROMPTS, new_tokens=6, chunk=chunk)


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "layercast", "exact"])
def test_orders_and_gpus_score_with_one_capture(precision, captures):
    changes = [{}, {"order": 1}, {"gpu": "h100"}, {"gpu": "a100"}, {}]
    units = [Unit("forced", Configuration(precision=precision, **change)) for change in changes]
    assert len({key_of(unit) for unit in units}) == 1
    with strict_dynamo():
        shared = build(Tiny(), units[0])
        found = []
        for unit in units:
            shared.use(unit.configuration)
            found.append(scored(shared))
        assert len({id(graph) for graph in captures}) == 1
        for digests, unit in zip(found, units, strict=True):
            assert same(digests, scored(build(Tiny(), unit)))
    assert same(found[0], found[-1])
    assert same(found[0], found[2]) == (precision == "exact")


@pytest.mark.parametrize(
    ("precision", "compiled"), [("fp32", True), ("heal", False), ("layercast", True)]
)
def test_orders_generate_with_one_model(precision, compiled):
    units = [Unit("greedy", Configuration(precision=precision, order=order)) for order in (2, 1)]
    assert len({key_of(unit) for unit in units}) == 1
    with strict_dynamo():
        shared = build(Tiny(), units[0], compiled=compiled)
        found = []
        for unit in units:
            shared.use(unit.configuration)
            found.append(generated(shared, None))
        for outputs, unit in zip(found, units, strict=True):
            assert outputs == generated(build(Tiny(), unit, compiled=compiled), None)
    assert found[0] != found[1]  # tokens are likely equal, probabilities are not


@pytest.mark.parametrize("precision", ["layercast", "exact"])
def test_chunks_of_any_length_take_one_graph_more(precision, captures):
    plain, chunked = (
        Unit("greedy", Configuration(precision=precision, chunk=c)) for c in (None, 2)
    )
    assert key_of(plain) == key_of(chunked)
    with strict_dynamo():
        network = build(Tiny(), plain, compiled=False)
        whole = generated(network, None)
        known = {id(graph) for graph in captures}
        assert len(known) == 2  # prefill and decode
        pieces = [generated(network, chunk) for chunk in (2, 3)]
        assert len({id(graph) for graph in captures} - known) == 1
    assert [[one.tokens for one in some] for some in pieces] == [[one.tokens for one in whole]] * 2
    if precision == "exact":
        assert pieces == [whole, whole]


def test_a_graph_that_needs_more_of_its_sizes_is_not_shared(monkeypatch):
    rewritten = interpreting._rewritten

    def demanding(graph_module, configuration):
        if configuration.order:
            values = [node.meta.get("example_value") for node in graph_module.graph.nodes]
            size = next(value for value in values if isinstance(value, torch.SymInt))
            assert size % 2 in (0, 1)
        return rewritten(graph_module, configuration)

    monkeypatch.setattr(interpreting, "_rewritten", demanding)
    unit = Unit("forced", Configuration(precision="layercast"))
    with strict_dynamo():
        network = build(Tiny(), unit)
        scored(network)
        network.use(Configuration(precision="layercast", order=1))
        with pytest.raises(StudyError, match="holds only where"):
            scored(network)
