"""Whole models of twelve families: everything rewritten, as accurate as FP32, forward and
backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import healpass
from tests.support.families import DECODER_ONLY, FAMILIES, Family
from tests.support.rewriting import Rewritten

BF16 = torch.bfloat16
SEEDS = range(8)
#: Families that `make test` compiles with Inductor, too; `make test-deep` compiles them all.
INDUCTOR = ("llama", "mixtral")
Call = Callable[..., Any]
KEPT = Path(__file__).parents[1] / "golden" / "kept_nodes.expected"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_matmul_is_rewritten_or_listed(family: Family):
    """What a family keeps stands, with its reason, in tests/golden/kept_nodes.expected."""
    model, _ = family.pair(0, BF16)
    with torch.no_grad():
        report = healpass.explain(model)(**family.inputs(BF16))
    assert len(report.nodes) >= 10
    found = sorted({f"{family.name}: {node.op}: {node.reason}" for node in report.kept})
    expected = [
        line for line in KEPT.read_text().splitlines() if line.startswith(family.name + ":")
    ]
    assert found == expected
    assert not (family.name in DECODER_ONLY and report.kept)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_and_gradients_are_as_good_as_fp32(family: Family):
    """The rewritten graph and its backward, run by plain torch, beside the FP32 model in plain
    torch."""
    model, _ = family.pair(0, BF16)
    config = healpass.HealConfig(precision="layercast", outputs="fp32")
    single = family.twin(model, torch.float32)
    _check(family, model, Rewritten(model, config, aot=True), single, single)


@pytest.mark.parametrize("name", [
    *INDUCTOR,
    *(pytest.param(f.name, marks=pytest.mark.deep) for f in FAMILIES if f.name not in INDUCTOR),
])  # fmt: skip
def test_compiled_logits_and_gradients_are_as_good_as_fp32(name: str):
    """The same through Inductor, beside the FP32 model through Inductor."""
    (family,) = (family for family in FAMILIES if family.name == name)
    model, _ = family.pair(0, BF16)
    options = {"precision": "layercast", "outputs": "fp32"}
    single = family.twin(model, torch.float32)
    compiled = torch.compile(model, backend="heal", options=options)
    _check(family, model, compiled, single, torch.compile(single))


def _check(family: Family, model: nn.Module, ours: Call, single: nn.Module, theirs: Call) -> None:
    """Over eight seeds: logits within 1.1x of FP32's error, gradients within 1.1x of their
    rounding.

    The weights are BF16 and so are the gradients, so the best a gradient can be is the exact one
    rounded. All errors are against the same model in FP64.
    """
    exact = family.twin(model, torch.float64)
    logit_ratios, gradient_ratios = [], []
    for seed in SEEDS:
        _copy_weights(family.pair(seed, BF16)[0], (model, exact, single))
        found = _run(family, model, BF16, ours)
        fp32 = _run(family, single, torch.float32, theirs)
        truth = _run(family, exact, torch.float64, exact)
        logit_ratios.append(_distance(found[:1], truth[:1]) / _distance(fp32[:1], truth[:1]))
        rounded = [gradient.to(BF16) for gradient in truth[1:]]
        gradient_ratios.append(_distance(found[1:], truth[1:]) / _distance(rounded, truth[1:]))
    mean = math.exp(sum(map(math.log, logit_ratios)) / len(logit_ratios))
    print(
        f"{family.name}: logits {mean:.3f} of FP32's error, gradients {max(gradient_ratios):.4f}"
    )
    assert mean <= 1.1
    assert max(gradient_ratios) <= 1.1


def test_plain_bf16_is_far_outside_both_limits():
    """The inverse: without the rewrite the same measures are missed by far."""
    family = FAMILIES[0]
    model, exact = family.pair(0, BF16)
    single = family.twin(model, torch.float32)
    ours, truth = _run(family, model, BF16, model), _run(family, exact, torch.float64, exact)
    theirs = _run(family, single, torch.float32, single)
    rounded = [gradient.to(BF16) for gradient in truth[1:]]
    assert _distance(ours[:1], truth[:1]) > 1000 * _distance(theirs[:1], truth[:1])
    assert _distance(ours[1:], truth[1:]) > 2 * _distance(rounded, truth[1:])


def _copy_weights(source: nn.Module, targets: tuple[nn.Module, ...]) -> None:
    with torch.no_grad():
        for target in targets:
            for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
                ours.copy_(theirs)


@torch.enable_grad()
def _run(family: Family, model: nn.Module, dtype: torch.dtype, call: Call) -> list[torch.Tensor]:
    """Logits, then the gradients of all parameters, for one upstream gradient."""
    model.zero_grad()
    logits = call(**family.inputs(dtype)).logits
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(logits.shape, generator=generator).to(BF16).to(logits.dtype)
    (logits * upstream).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [logits.detach(), *gradients]


def _distance(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return (
        sum(float((a.double() - b).norm() ** 2) for a, b in zip(found, exact, strict=True)) ** 0.5
    )
