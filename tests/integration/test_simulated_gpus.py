"""heal against FP32 on SmolLM2's own layers: the table and its claims.

One first token carries activations hundreds of times larger than all others. Where a single
product makes the sum, torch's FP32 rounds a few times, a tensor core truncates at most four times
before its chain ends; a GPU's own FP32, one chain of fused multiply-adds, errs more still.
"""

import io

import pytest
import torch
from rich.console import Console

from healpass.tensorcore import Accumulation, heal_matmul
from tests.support.against_torch import chance
from tests.support.examples import load_example

pytestmark = pytest.mark.model
SIMULATED = ("heal, ideal", "heal, v100", "heal, a100", "heal, h100 and b200")


@pytest.fixture(scope="module")
def example():
    return load_example("simulated_gpus")


def errors_of(example, tokens, layers):
    """Errors by method, and the printed table."""
    found = example.capture(tokens, layers)
    out = io.StringIO()
    measured = example.measure(found, Console(file=out))
    Console(file=out, width=140).print(example.table_of(found, measured))
    return {name: errors for name, (errors, _) in measured.items()}, out.getvalue()


def ratios(errors, baseline):
    return sorted(e / b for e, b in zip(errors, baseline, strict=True))


def test_the_table_of_one_block(example):
    errors, table = errors_of(example, tokens=16, layers=1)
    assert "Error of 7 linear layers, 16 tokens" in table
    assert all(name in table for name in example.METHODS)
    for name in SIMULATED:
        found = ratios(errors[name], errors[example.BASELINE])
        print(f"{name}: median {found[3]:.2f}, worst {found[-1]:.2f}")
        assert found[3] <= 1
        assert found[-1] <= 1.2
    assert min(ratios(errors["bf16"], errors[example.BASELINE])) > 1.2, "the inverse"


def test_a_forward_pass_is_timed(example):
    out = io.StringIO()
    with torch.no_grad():
        table = example.forward_times(16, 1, Console(file=out), ("a100",))
    Console(file=out, width=140).print(table)
    assert "A forward pass of 16 tokens, 1 block(s)" in out.getvalue()
    assert out.getvalue().count(" s ") >= 3


@pytest.mark.deep
def test_all_layers_are_as_accurate_as_fp32(example):
    errors, table = errors_of(example, tokens=64, layers=30)
    print(table)
    fp32, chain = errors[example.BASELINE], errors["layercast"]
    for name in SIMULATED:
        found = ratios(errors[name], fp32)
        assert found[len(found) // 2] <= 1
        limit = chance(64)  # of the tokens: outputs of one token share its activation
        assert ratios(errors[name], chain)[-1] <= limit, "never above a GPU's own FP32"
        assert found[-1] <= limit, f"{name}: {sum(ratio > limit for ratio in found)} above"


@pytest.mark.deep
def test_longer_chains_err_more_where_one_product_makes_the_sum(example):
    """The inverse: one chain per tile of 64, as on H100, is too long for an A100."""
    layer = example.capture(tokens=64, layers=12)[-1]
    assert layer.name == "11.mlp.down_proj"
    baseline = example.error(example.fp32(layer.activation, layer.weight), layer)
    for every, holds in (("rule", True), (64, False)):
        how = Accumulation("a100", promote_every=every)
        y = heal_matmul(layer.activation, layer.weight.t(), how)
        print(f"{every}: {example.error(y, layer) / baseline:.2f}")
        assert (example.error(y, layer) <= chance(len(y)) * baseline) == holds
