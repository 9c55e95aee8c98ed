"""`explain(observe=True)`: errors beside their bounds, node by node and at the outputs."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import healpass
from healpass import HealConfig
from healpass.arithmetic.compound_rules import sdpa
from healpass.arithmetic.propagate import Analysis, exact
from healpass.graph import observe
from tests.support.against_torch import random

BF16 = torch.bfloat16
CONFIG = HealConfig(outputs="fp32", kv="fp32")


class Block(nn.Module):
    """A pre-norm attention block: linear layers, SDPA, a norm, a residual."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(32, dtype=BF16)
        self.qkv = nn.Linear(32, 96, dtype=BF16)
        self.out = nn.Linear(32, 32, bias=False, dtype=BF16)

    def forward(self, x):
        heads = [
            y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1)
        ]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


def explained(function, *args, config=CONFIG, **kwargs):
    return healpass.explain(function, config, observe=True)(*args, **kwargs)


X = random(2, 5, 32).to(BF16)


def test_every_node_and_output_is_within_its_bound():
    report = explained(Block(), X)
    ratios = [node.observed for node in report.nodes]
    print(ratios, report.outputs)
    assert len(ratios) == 3
    assert all(0 < ratio <= 1 for ratio in ratios)
    (output,) = report.outputs
    assert output.shape == "[2, 5, 32]"
    assert not output.first_order
    assert 1e-4 < output.observed <= 1
    assert 0 < output.expected < output.bound


@pytest.mark.parametrize("simulate", ["v100", "a100", "h100"])
def test_simulated_hardware_is_held_to_its_own_bound(simulate):
    config = HealConfig(outputs="fp32", kv="fp32", debug={"simulate": simulate})
    report = explained(lambda x, w: F.linear(x, w), X.float(), random(7, 32), config=config)
    assert 0 < report.nodes[0].observed <= 1
    assert 0 < report.outputs[0].observed <= 1


def test_a_node_that_is_wrong_is_seen(monkeypatch):
    """The inverse: round every product to BF16."""
    monkeypatch.setattr(torch.fx.Interpreter, "run_node", rounded_run_node(), raising=True)
    report = explained(Block(), X)
    assert max(node.observed for node in report.nodes) > 1
    assert report.outputs[0].observed > 1


def rounded_run_node():
    run_node = torch.fx.Interpreter.run_node

    def wrong(self, node):
        result = run_node(self, node)
        return result.bfloat16().float() if "linear" in str(node.target) else result

    return wrong


def test_a_long_graph_is_bounded_to_first_order_where_errors_are_largest(monkeypatch):
    monkeypatch.setattr(observe, "RIGOROUS", 10)
    (output,) = explained(Block(), X).outputs
    assert output.first_order
    assert output.shape == f"[{observe.CHOSEN}]"
    assert 0 < output.observed <= 1


def test_first_order_and_proved_bounds_agree(monkeypatch):
    """What first order leaves out is of the order of the square of the bound."""
    block = Block()
    (proved,) = explained(block, X).outputs
    monkeypatch.setattr(observe, "RIGOROUS", 10)
    monkeypatch.setattr(observe, "CHOSEN", 320)
    (first,) = explained(block, X).outputs
    assert first.bound <= proved.bound <= first.bound * (1 + 2.0**-10)


@pytest.mark.parametrize(
    ("a", "b"), [((4,), (4,)), ((4,), (4, 3)), ((2, 3, 4), (4,)), ((2, 3, 4), (2, 4, 5))]
)
def test_products_of_any_rank_are_compared(a, b):
    report = explained(lambda x, y: x @ y, random(*a), random(*b))
    assert 0 <= report.nodes[0].observed <= 1
    assert 0 <= report.outputs[0].observed <= 1


def test_what_has_no_error_rule_says_so():
    report = explained(lambda x, w: (x @ w).cumsum(-1), X, random(32, 3).to(BF16))
    assert report.nodes[0].observed is not None
    assert "no error rule for 'cumsum'" in report.outputs[0].reason
    assert "no error rule for 'cumsum'" in str(report)


@pytest.mark.parametrize("kv", ["int16", "int24"])
def test_quantized_attention_is_held_to_the_bound_of_its_format(kv):
    config = HealConfig(outputs="fp32", kv=kv)
    report = explained(Block(), X, config=config)
    ratios = {node.heal_op: node.observed for node in report.nodes}
    print(ratios)
    assert 0 < ratios["heal::sdpa"] <= 1
    assert 0 < report.outputs[0].observed <= 1


def test_a_coarser_format_breaks_the_bound_of_a_finer_one(monkeypatch):
    """The inverse: INT16 attention against the bound of INT24."""
    q = random(1, 2, 5, 8)
    attended = torch.ops.heal.sdpa(q, q, q, kv="int16")
    ideal = sdpa(Analysis(), *map(exact, (q, q, q)), kv="int24")
    assert observe.worst_ratio(attended, ideal.value.detach(), ideal.error) > 1


@pytest.mark.parametrize(
    "more",
    [{"window": 2}, {"softcap": 0.5}, {"sinks": random(4)}, {"is_causal": True, "softcap": 3.0}],
    ids=" and ".join,
)
@pytest.mark.parametrize("kv", ["fp32", "int16"])
def test_what_current_models_add_to_attention_has_bounds(more, kv):
    q, k = random(2, 4, 9, 8), random(2, 2, 9, 8)

    def attend(q, k):
        return torch.ops.heal.sdpa(q, k, k, enable_gqa=True, kv=kv, **more)

    report = explained(attend, q, k, config=HealConfig(outputs="fp32", kv=kv))
    assert 0 < report.nodes[0].observed <= 1
    assert 0 < report.outputs[0].observed <= 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(mode):
    with mode():
        before = torch.is_grad_enabled()
        (output,) = explained(Block(), random(2, 5, 32)).outputs
        assert torch.is_grad_enabled() == before
    assert output.reason is None
    assert 0 < output.observed <= 1


X4, W4 = random(4, 32).float(), random(32, 4).float()


def written(x, w):
    y = x @ w
    y.mul_(2)
    return y


def seen_through_a_view(x, w):
    y = x @ w
    y[0].mul_(2)
    return y


def augmented(x, w):
    y = x @ w
    z = y[0]
    y += 1
    return z


def inputs_written(x, w):
    return x.add_(1) @ w


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (written, "mul_"),
        (seen_through_a_view, "mul_"),
        (augmented, "iadd"),
        (inputs_written, "add_"),
        (lambda x, w: F.relu(x @ w, inplace=True), "inplace"),
        (lambda x, w: F.silu(x @ w, inplace=True), "inplace"),
        (lambda x, w: x @ w + torch.rand(4), "rand"),
        (lambda x, w: (x @ w).sum(dtype=torch.float64), "sum"),
    ],
    ids=("written", "view", "augmented", "inputs", "relu", "silu", "random", "dtype"),
)
def test_what_cannot_be_followed_gets_no_number(function, word):
    (output,) = explained(function, X4.clone(), W4).outputs
    assert output.bound is None
    assert word in output.reason


def test_16_bit_arithmetic_gets_no_number():
    config = HealConfig(precision="traced")
    report = explained(lambda x, w: F.silu(x @ w) + 3, X4.bfloat16(), W4.bfloat16(), config=config)
    assert "runs in 16 bits" in report.outputs[0].reason


def test_exact_products_have_no_rule_and_say_so():
    report = explained(lambda x, w: x @ w, X4, W4, config=HealConfig(precision="exact"))
    assert report.nodes[0].observed is None
    assert "no error bound for precision='exact'" in report.nodes[0].unobserved
    assert "node(s) without an observed error: no error bound" in " ".join(str(report).split())


def test_an_fp32_graph_that_is_left_as_traced_is_bounded_as_torch_adds():
    config = HealConfig(precision="traced")
    (output,) = explained(lambda x, w: x @ w, X4.float(), W4.float(), config=config).outputs
    assert 0 < output.observed <= 1


def test_an_error_does_not_end_at_a_detach():
    (output,) = explained(lambda x, w: (x @ w).detach() * 2, X4, W4).outputs
    assert 0 < output.observed <= 1


def test_a_widened_operand_is_bounded_as_the_operator_takes_it():
    """BF16 made FP32 is split under a row scale, where tiny elements are lost."""
    x, w = torch.tensor([[1.0, 2.0**-60]]).bfloat16(), torch.tensor([[0.0], [1.0]]).bfloat16()
    config = HealConfig(outputs="fp32", debug={"simulate": "a100"})
    (output,) = explained(lambda x, w: x.float() @ w.float(), x, w, config=config).outputs
    assert output.observed <= 1


def test_a_hidden_key_of_a_finite_mask_does_not_unbind_its_row():
    q, mask = random(1, 2, 5, 8).float(), torch.zeros(5, 5)
    mask[:, 3:] = torch.finfo(torch.float32).min
    report = explained(lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m), q, mask)
    assert report.outputs[0].bound < 1e-3
    assert 0 < report.outputs[0].observed <= 1


def test_a_row_without_variance_is_within_its_bound_or_unbounded():
    x = torch.tensor([[2.0**25 + 4, 2.0**25, 2.0**25, 2.0**25]])
    for function in (
        lambda x: F.layer_norm(x, (4,)),
        lambda x: F.rms_norm(x * 1e-30, (4,), eps=0),
    ):
        (output,) = explained(function, x).outputs
        assert not output.observed > 1


def test_a_report_with_infinities_is_json_and_says_unbounded():
    (output,) = (report := explained(lambda x: x.sum().rsqrt(), torch.zeros(3))).outputs
    assert output.bound == float("inf")
    assert "unbounded" in str(report)
    assert json.loads(report.to_json())["graphs"][0]["outputs"][0]["bound"] == "inf"
    assert "unbounded" in report._repr_html_()


def test_masks_and_integers_pass_through():
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    q = random(1, 2, 5, 8)

    def attend(q, mask):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask), mask.sum()

    report = explained(attend, q, mask)
    assert len(report.outputs) == 1
    assert 0 < report.outputs[0].observed <= 1


def test_the_report_shows_what_was_observed():
    report = explained(Block(), X)
    text = str(report)
    assert "observed/bound" in text
    assert "proved" in text
    data = json.loads(report.to_json())
    assert data["graphs"][0]["outputs"][0]["observed"] == report.outputs[0].observed
    plain = healpass.explain(Block(), CONFIG)(X)
    assert plain.outputs == []
    assert all(node.observed is None for node in plain.nodes)
