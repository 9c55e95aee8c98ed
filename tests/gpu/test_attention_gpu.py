"""The attention kernels on a GPU: bounds, equal rows and tiles, gradients, CUDA graphs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from healpass import lowering
from healpass.lowering.cuda import attention, attention_gradients
from healpass.lowering.cuda.tiles import AttentionTile
from healpass.ops.attention.scoring import Scoring
from tests.support.attention_runs import (
    FAMILIES,
    Problem,
    assert_gradients_within_bound,
    assert_within_bound,
    build,
    family,
    mask_of,
    random,
)

OPTIONS = {"fx_graph_cache": False}
FORMATS = ("int16", "int24", "fp32")


def compiled(name: str, call: list[Any]) -> tuple[Tensor, ...]:
    """An operator through freshly compiled code on the GPU; results on CPU, for the checks."""
    lowering.register()
    torch._dynamo.reset()
    call = [x.cuda() if isinstance(x, Tensor) else x for x in call]
    operator = getattr(torch.ops.heal, name)
    function = torch.compile(operator, fullgraph=True, dynamic=False, options=OPTIONS)
    return tuple(result.cpu() for result in function(*call))


def attend(problem: Problem) -> tuple[Tensor, ...]:
    return compiled(problem.name, problem.call())


def gradients_of(problem: Problem, grad: Tensor) -> tuple[Tensor, ...]:
    return compiled(f"{problem.name}_backward", [grad, *problem.call(), *attend(problem)])


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (80, 40), (256, 256), (3, 5)])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 1000), (5, 77), (130, 130), (300, 513)])
def test_attention_is_within_its_bound(lengths, size, kv):
    length, keys = lengths
    problem = build(2, 2, 3, length, keys, *size, kv, is_causal=length == keys)
    print(f"observed / bound = {assert_within_bound(problem, attend(problem)):.3g}")


SCORINGS: dict[str, dict[str, Any]] = {
    "bool mask": {"attn_mask": mask_of("bool", 70, 90, 0)},
    "float mask": {"attn_mask": mask_of("float", 70, 90, 0)},
    "window": {"is_causal": True, "window": 20},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": torch.randn(4, generator=torch.Generator().manual_seed(0))},
    "dropout": {"dropout_p": 0.3, "drops": torch.tensor([0x123456789ABCDEF])},
}


@pytest.mark.parametrize("kv", ["int16", "fp32"])
@pytest.mark.parametrize("kind", SCORINGS)
def test_scoring_and_its_gradients_are_within_their_bounds(kind, kv):
    problem = build(length=70, keys=90, value_size=48, kv=kv, **SCORINGS[kind])
    assert_within_bound(problem, attend(problem))
    grad = random((1, 4, 70, 48), 9)
    assert_gradients_within_bound(problem, grad, gradients_of(problem, grad))


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_gradients_are_within_their_bound(size, kv):
    problem = build(length=100, keys=100, size=size, value_size=size, kv=kv, is_causal=True)
    grad = random((1, 4, 100, size), 9)
    assert_gradients_within_bound(problem, grad, gradients_of(problem, grad))


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_padding_and_more_keys_leave_bits_alone(name):
    problem, visible = family(name), 130
    whole, alone = attend(problem), attend(problem.part(batch=slice(1, 2)))
    assert all(torch.equal(x[1:2], y) for x, y in zip(whole, alone, strict=True))
    mask = (torch.arange(300) < visible).expand(FAMILIES[name], 300)
    hidden = slice(visible, None)
    padded = dataclasses.replace(
        problem.with_scoring(attn_mask=mask),
        key=problem.key.poisoned(hidden),
        value=problem.value.poisoned(hidden),
    )
    assert all(map(torch.equal, attend(padded), attend(problem.part(keys=slice(0, visible)))))


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tile_gives_the_same_bits(name, kv, monkeypatch):
    """Up to 32 rows the compiler takes mma.sync, from 64 on wgmma: the same bits, too."""
    problem = family(name, kv=kv, batch=1, is_causal=name == "prefill")
    grad = random((1, 2, FAMILIES[name], 64), 9)
    results = []
    for tile in (AttentionTile(16, 4, 1), AttentionTile(32, 8, 2), AttentionTile(64, 8, 1)):
        monkeypatch.setattr(attention, "attention_tiles", lambda *_, tile=tile: [tile])
        monkeypatch.setattr(
            attention_gradients, "attention_backward_tiles", lambda *_, tile=tile: ([tile], [tile])
        )
        results.append((*attend(problem), *gradients_of(problem, grad)))
    differing = [
        [(x != y).float().mean().item() for x, y in zip(results[0], other, strict=True)]
        for other in results[1:]
    ]
    assert not any(map(any, differing)), f"share of elements that differ: {differing}"


def test_floats_are_as_close_to_fp64_as_fp32_attention():
    """Compared on the GPU with torch's own FP32 arithmetic, which has K u and no better bound."""
    states = [random((2, 4, 200, 64), seed).cuda() for seed in range(3)]
    lowering.register()
    torch._dynamo.reset()
    function = torch.compile(torch.ops.heal.attention, fullgraph=True, options=OPTIONS)
    found, _ = function(*states, *Scoring(0.125, is_causal=True).arguments, "heal")
    query, key, value = (x.double() for x in states)
    scores = (query @ key.mT * 0.125).masked_fill(
        ~torch.ones(200, 200, dtype=torch.bool, device="cuda").tril(), -math.inf
    )
    weights = torch.softmax(scores, -1)
    terms = 2 * (64 + 4) * scores[scores.isfinite()].abs().max() + 2 * 200
    bound = terms * 2.0**-24 * (weights @ value.abs())
    assert ((found.double() - weights @ value).abs() <= bound).all()


def test_cuda_graphs_give_the_same_bits():
    problem = family("decode")
    plain = attend(problem)
    torch._dynamo.reset()
    call = [x.cuda() if isinstance(x, Tensor) else x for x in problem.call()]
    options = {**OPTIONS, "triton.cudagraphs": True}
    graphed = torch.compile(torch.ops.heal.integer_attention, fullgraph=True, options=options)
    for _ in range(3):
        results = graphed(*call)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(results, plain, strict=True))
