"""`prepack=True`: frozen BF16 weights converted once, the same numbers, nothing doubled unsaid."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from healpass import HealConfig, explain, inductor_options
from healpass.arithmetic.bounds import matmul_bound, matmul_magnitudes
from healpass.errors import ConfigError
from healpass.graph.passes import prepack
from tests.support.fake_cuda import generated_source, kernels
from tests.support.rewriting import Rewritten

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PREPACK = HealConfig(prepack=True, outputs="fp32")


def linear(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    """A frozen BF16 layer whose channels differ in magnitude by 2^40."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=BF16)
    scale = 2.0 ** torch.randint(-20, 21, (outputs, 1), generator=generator)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) * scale)
    return layer.requires_grad_(False)


def rows(count: int, inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed)).to(BF16)


def assert_within_bound(layer: nn.Linear, x: Tensor, result: Tensor) -> None:
    weight = layer.weight.mT
    exact = x.double() @ weight.double()
    bound = matmul_bound("heal", x.shape[1], left="bf16", right="bf16")
    bound = bound.evaluate(**matmul_magnitudes(x, weight))
    if layer.bias is not None:
        exact = exact + layer.bias.double()
        bound = bound + exact.abs() * 2.0**-23
    worst = ((result.double() - exact).abs() / bound).max().item()
    print(f"observed / bound = {worst:.3g}")
    assert worst <= 1


@settings(max_examples=15)
@given(*map(st.integers, (1, 1, 1, 0), (40, 70, 20, 9)), st.booleans())
def test_a_packed_layer_keeps_its_bound(count, inputs, outputs, seed, bias):
    torch._dynamo.reset()
    layer, x = linear(inputs, outputs, seed, bias), rows(count, inputs, seed)
    with pytest.warns(prepack.PrepackWarning):
        assert_within_bound(layer, x, Rewritten(layer, PREPACK)(x))


def test_the_graph_takes_fp16_and_multiplies_by_a_power_of_two():
    layer = linear(32, 8)
    compiled = Rewritten(layer, PREPACK)
    with pytest.warns(prepack.PrepackWarning):
        compiled(rows(3, 32))
    inputs = compiled.graphs[0].graph.find_nodes(op="placeholder")
    dtypes = [node.meta["example_value"].dtype for node in inputs]
    assert sorted(map(str, dtypes)) == sorted(map(str, (FP16, BF16, BF16, FP32)))
    scale = prepack.packed(layer.weight).scale
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((8,), 0.5))


def test_compiled_code_does_the_same_forward_and_backward():
    layer, x = linear(24, 16), rows(5, 24).float().requires_grad_()
    with pytest.warns(prepack.PrepackWarning, match=r"1 weights of this graph a second time"):
        result = torch.compile(
            layer, backend="heal", options={"prepack": True, "outputs": "fp32"}
        )(x.to(BF16))
    assert_within_bound(layer, x.detach().to(BF16), result.detach())
    result.sum().backward()
    exact = layer.weight.double().sum(0).expand(5, 24)
    size = layer.weight.double().abs().sum(0)
    assert ((x.grad.double() - exact).abs() <= size * 2.0**-8).all(), "rounded once, to BF16"


def test_a_weight_is_converted_once_for_all_graphs_and_goes_with_its_model():
    layer = linear(24, 16)
    for count in (2, 3):
        with pytest.warns(prepack.PrepackWarning):
            Rewritten(layer, PREPACK)(rows(count, 24))
    first = prepack.packed(layer.weight)
    assert prepack.packed(layer.weight) is first
    before = len(prepack._store())
    del layer, first
    torch._dynamo.reset()
    gc.collect()
    assert len(prepack._store()) < before


def test_a_weight_that_is_written_to_is_converted_anew():
    layer, x = linear(24, 16), rows(4, 24)
    compiled = Rewritten(layer, PREPACK)
    with pytest.warns(prepack.PrepackWarning):
        compiled(x)
    with torch.no_grad():
        layer.weight.mul_(-3)
    assert_within_bound(layer, x, compiled(x))


class Tied(nn.Module):
    """An embedding that is the last layer's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(9, 8, dtype=BF16), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(F.embedding(tokens, self.table), self.table)


@pytest.mark.parametrize("kind", ["trained", "fp16", "tied"])
def test_other_weights_stay_as_they_are(kind):
    models = {
        "trained": (linear(8, 8).requires_grad_(True), rows(3, 8)),
        "fp16": (linear(8, 8).half(), rows(3, 8).half()),
        "tied": (Tied(), torch.arange(4)),
    }
    model, x = models[kind]
    compiled = Rewritten(model, PREPACK)
    with warnings.catch_warnings():
        warnings.simplefilter("error", prepack.PrepackWarning)
        compiled(x)
    assert prepack.POSITIONS not in compiled.graphs[0].meta


def test_without_the_option_nothing_is_packed():
    compiled = Rewritten(linear(8, 8), HealConfig())
    compiled(rows(3, 8))
    assert prepack.POSITIONS not in compiled.graphs[0].meta


def test_explain_shows_a_packed_model():
    with pytest.warns(prepack.PrepackWarning):
        report = explain(linear(8, 8), prepack=True)(rows(3, 8))
    changed = {p["name"]: p["changed"] for graph in report.graphs for p in graph.passes}
    assert changed["prepack"] == 1


def test_the_second_door_refuses_and_names_the_first():
    with pytest.raises(ConfigError, match="needs backend='heal'"):
        inductor_options(prepack=True)


def test_a_packed_weight_needs_no_kernel_of_its_own_on_cuda():
    """One kernel for the activations' pieces, one for the product with scale and bias fused."""

    def layer(x, weight, scale, bias):
        return (torch.ops.heal.mm(x, weight.t(), "heal") * scale + bias,)

    def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    tensors = [empty(64, 512), empty(256, 512, dtype=FP16), empty(256), empty(256, dtype=BF16)]
    found = kernels(generated_source(layer, tensors))
    assert [kernel.is_template for kernel in found][-1]
    assert not any("512, 256" in kernel.source for kernel in found[:-1])
    unpacked = [tensors[0], empty(256, 512, dtype=BF16), *tensors[2:]]
    assert len(found) < len(kernels(generated_source(layer, unpacked)))
