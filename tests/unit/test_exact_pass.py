"""The pass `exact`: what it rewrites, what it lists, and that nothing else is left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

from healpass.backend import inductor_patches
from healpass.config import HealConfig
from healpass.errors import ConfigError
from healpass.graph.nodes import heal_name, op_name, value
from healpass.ops.reproducible import fp64
from tests.support.against_torch import flat
from tests.support.bits import differing
from tests.support.rewriting import Rewritten, to

CONFIG = HealConfig(precision="exact", outputs="fp32")
INF, NAN = float("inf"), float("nan")


def x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A, B, W = x(4, 6), x(4, 6, seed=1).abs() + 0.1, x(6, seed=2)
CLASSES = torch.tensor([0, 3, -100, 5])

#: Functions, their operands, and the heal operators that must take their place.
REWRITTEN = {
    "exp": (lambda a: a.exp(), (A,), {"exp"}),
    "sigmoid": (torch.sigmoid, (A,), {"sigmoid"}),
    "gelu": (F.gelu, (A,), {"gelu"}),
    "gelu tanh": (lambda a: F.gelu(a, approximate="tanh"), (A,), {"gelu_tanh"}),
    "softplus": (F.softplus, (A,), {"softplus"}),
    "logsigmoid": (F.logsigmoid, (A,), {"logsigmoid"}),
    "division": (lambda a, b: a / b, (A, B), {"div"}),
    "division by a number": (lambda a: a / 3.0, (A,), {"div"}),
    "number by tensor": (lambda a: 1.0 / a, (B,), {"div"}),
    "reciprocal": (torch.reciprocal, (B,), {"reciprocal"}),
    "division in place": (lambda a, b: a.clone().div_(b), (A, B), {"div"}),
    "square": (lambda a: a.pow(2), (A,), {"pow_scalar"}),
    "power": (lambda a, b: b**a, (A, B), {"pow"}),
    "number to a power": (lambda a: 2.0**a, (A,), {"pow"}),
    "sum": (lambda a: a.sum(-1), (A,), {"sum"}),
    "sum of all": (torch.sum, (A,), {"sum"}),
    "mean": (lambda a: a.mean((0, 1), keepdim=True), (A,), {"mean"}),
    "variance": (lambda a: a.var(-1, unbiased=False), (A,), {"var"}),
    "deviation": (lambda a: a.std(0), (A,), {"var", "sqrt"}),
    "norm": (lambda a: torch.linalg.vector_norm(a, dim=-1), (A,), {"sum", "sqrt", "pow_scalar"}),
    "cumulative sum": (lambda a: a.cumsum(0), (A,), {"cumsum"}),
    "softmax": (lambda a: a.softmax(-1), (A,), {"softmax"}),
    "log softmax": (lambda a: F.log_softmax(a, dim=0), (A,), {"log_softmax"}),
    "layer norm": (lambda a, w: F.layer_norm(a, (6,), w, w), (A, W), {"layer_norm"}),
    "rms norm": (lambda a, w: F.rms_norm(a, (6,), w, 1e-6), (A, W), {"rms_norm"}),
    "cross entropy": (F.cross_entropy, (A, CLASSES), {"cross_entropy"}),
    "cross entropy by position": (
        lambda a, t: F.cross_entropy(a, t, None, None, 3, None, "sum", 0.1),
        (A, CLASSES.clamp(min=0)),
        {"cross_entropy"},
    ),
    "nll": (lambda a, t: F.nll_loss(a, t), (A, CLASSES), {"nll_loss"}),
    "rotary": (lambda a, b: a * b.cos() + a.flip(-1) * b.sin(), (A, B), {"sin", "cos"}),
    "linear": (F.linear, (A, x(5, 6)), {"linear"}),
    "attention": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        (x(1, 2, 4, 8),),
        {"sdpa"},
    ),
}


def operators(rewritten: Rewritten) -> set[str]:
    return {
        name.removeprefix("heal::")
        for graph in rewritten.graphs
        for node in graph.graph.nodes
        if (name := heal_name(node)) is not None
    }


@pytest.mark.parametrize("name", REWRITTEN)
def test_an_operator_gets_its_exact_one_and_means_the_same(name):
    function, operands, expected = REWRITTEN[name]
    rewritten = Rewritten(function, CONFIG)
    found = rewritten(*operands)
    assert operators(rewritten) - {"canonical"} == expected
    assert rewritten.kept == {}
    exact = function(*to(operands, torch.float64))
    loose = 2.0**-12 if name in ("linear", "attention") else 2.0**-21  # digits of two products
    assert (found.double() - exact).abs().max() <= loose * exact.abs().max()


def test_factors_are_products_of_their_own():
    """torch's eager `add(alpha=)`, `addcmul` and `lerp` use an fma; ours do not."""
    t = x(4, 6, seed=9)
    for function, reproducible in (
        (lambda a, b: torch.add(a, b, alpha=0.3), A + B * torch.tensor(0.3)),
        (lambda a, b: torch.sub(a, b, alpha=0.3), A - B * torch.tensor(0.3)),
        (lambda a, b: torch.rsub(a, b, alpha=0.3), B - A * torch.tensor(0.3)),
        (lambda a, b: torch.addcmul(a, b, t, value=0.3), A + (B * t) * torch.tensor(0.3)),
        (lambda a, b: torch.lerp(a, b, 0.3), A + (B - A) * torch.tensor(0.3)),
    ):
        rewritten = Rewritten(function, CONFIG)
        assert differing(rewritten(A, B), reproducible) == 0
        assert rewritten.kept == {}


def test_single_operations_and_moves_stay():
    def function(a, b, index):
        c = torch.where(a > b, a * b - a, -b).clamp(-1, 1)
        return torch.cat([c.relu(), a.t().contiguous().t()]).index_select(0, index)

    rewritten = Rewritten(function, CONFIG)
    rewritten(A, B, torch.tensor([5, 0, 2]))
    assert operators(rewritten) <= {"canonical"}
    assert rewritten.kept == {}


KEPT = {
    "convolution": (lambda a: F.conv1d(a[None], a[:3, None, :2].repeat(1, 4, 1)), "convolutions"),
    "scatter": (
        lambda a: a.scatter_add(0, torch.zeros(4, 6, dtype=torch.int64), a),
        "a sum over repeated indices",
    ),
    "dropout": (lambda a: F.dropout(a, 0.5, training=True), "no exact operator"),
    "random": (lambda a: a + torch.rand(6), "random numbers"),
    "product": (lambda a: a.prod(-1), "no exact operator"),
    "float64": (lambda a: a.double().exp(), "float64"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_has_no_exact_operator_is_listed_and_strict_refuses_it(name):
    function, reason = KEPT[name]
    rewritten = Rewritten(function, CONFIG)
    rewritten(A)
    assert any(reason in text for text in rewritten.kept.values()), rewritten.kept
    torch._dynamo.reset()
    strict = HealConfig(precision="exact", strict=True)
    with pytest.raises(BackendCompilerFailed, match="StrictError: strict=True, but 1 of 1 nodes"):
        Rewritten(function, strict)(A)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
def test_attention_that_draws_random_numbers_is_listed(ours, by_name):
    """Whoever calls, and however the probability is given."""
    attend = torch.ops.heal.sdpa if ours else F.scaled_dot_product_attention

    def function(q):
        return attend(q, q, q, dropout_p=0.5) if by_name else attend(q, q, q, None, 0.5)

    rewritten = Rewritten(function, CONFIG)
    rewritten(x(1, 2, 4, 8))
    assert list(rewritten.kept.values()) == ["dropout draws random numbers"]
    with pytest.raises(BackendCompilerFailed, match="dropout draws random numbers"):
        Rewritten(function, HealConfig(precision="exact", strict=True))(x(1, 2, 4, 8))


def test_other_precisions_are_left_alone():
    rewritten = Rewritten(lambda a: a.exp().sum(), HealConfig())
    rewritten(A)
    assert operators(rewritten) == set()


# ------------------------------------------------------------------------------- ties and zeros

TIED = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [2.0, float("nan"), 9.0, float("nan"), 1.0]])


def test_ties_are_broken_by_the_lowest_index():
    def function(a):
        clean = a.nan_to_num(1.0)
        top = clean.topk(3, -1)
        return a.argmax(-1), a.argmax(), clean.argmin(-1, keepdim=True), top[0], top[1]

    rewritten = Rewritten(function, CONFIG)
    last, every, least, values, indices = rewritten(TIED)
    assert last.tolist() == [1, 1]
    assert every.item() == 6
    assert least.tolist() == [[3], [1]]
    assert values.tolist() == [[3.0, 3.0, 3.0], [9.0, 2.0, 1.0]]
    assert indices.tolist() == [[1, 2, 4], [2, 0, 1]]
    assert rewritten.kept == {}


def test_a_sort_is_made_stable():
    rewritten = Rewritten(lambda a: a.sort(-1)[1], CONFIG)
    rewritten(TIED)
    nodes = [n for g in rewritten.graphs for n in g.graph.nodes if op_name(n) == "sort"]
    assert [node.kwargs["stable"] for node in nodes] == [True]


def test_what_leaves_the_graph_has_zeros_of_one_sign():
    function = Rewritten(lambda a: ((a * 0.0).reshape(-1), (a * 0.0).bfloat16()), CONFIG)
    first, second = function(torch.tensor([[-1.0, 2.0]]))
    assert not first.signbit().any()
    assert not second.signbit().any()


def test_the_callers_memory_is_written_and_not_replaced():
    buffer = torch.zeros(4, 6)

    def function(a):
        buffer.copy_(a * 2)
        return buffer

    assert Rewritten(function, CONFIG)(A) is not None
    assert torch.equal(buffer, A * 2)


# ------------------------------------------------------------------------------------- options


def test_options():
    assert HealConfig(precision="exact").numerics == "exact5"
    assert HealConfig(precision="exact", exact_products=8).numerics == "exact8"
    simulated = HealConfig(precision="exact", debug={"simulate": "a100", "order": 3})
    assert simulated.numerics == "exact5:a100:3"
    with pytest.raises(ConfigError, match="kv='fp32' contradicts precision='exact'"):
        HealConfig(precision="exact", kv="fp32")
    with pytest.raises(ConfigError, match="needs precision='exact'"):
        HealConfig(exact_products=8)
    with pytest.raises(ConfigError, match="exact_products=4"):
        HealConfig(precision="exact", exact_products=4)


def test_every_setting_that_pins_arithmetic_is_one_that_inductor_knows():
    from torch._inductor import config as inductor

    patches = inductor_patches(HealConfig(precision="exact"))
    assert patches["emulate_precision_casts"] is True
    assert patches["cpp.enable_floating_point_contract_flag"] == "off"
    with inductor.patch({k: v for k, v in patches.items() if k != "post_grad_custom_pre_pass"}):
        assert inductor.eager_numerics.division_rounding is True
    assert inductor_patches(HealConfig())["emulate_precision_casts"] is False


def test_bounds_are_in_the_report():
    rewritten = Rewritten(F.linear, CONFIG)
    rewritten(A, x(5, 6).bfloat16())
    (node,) = rewritten.nodes
    assert node.bound.startswith("1.01 (2^-23 max|x| sum|w| + 2^-15 max|w| sum|x|)")


# ------------------------------------------------------------------------------------ gradients


def test_gradients_flow_through_exact_operators():
    """AOTAutograd traces the backward from the operators' own formulas."""

    def loss(a, w, b):
        hidden = F.silu(F.linear(a, w)) / (1 + b[:, :5].exp())
        return F.cross_entropy(F.layer_norm(hidden, (5,)), CLASSES.clamp(0, 4))

    inputs = [t.clone().requires_grad_() for t in (A, x(5, 6), B)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    rewritten = Rewritten(loss, HealConfig(precision="exact", exact_products=8), aot=True)
    ours = torch.autograd.grad(rewritten(*inputs), inputs)
    exact = torch.autograd.grad(loss(*wide), wide)
    for found, truth in zip(flat(ours), flat(exact), strict=True):
        assert (found.double() - truth).norm() <= 2.0**-16 * truth.norm()


def test_gradients_of_biases_and_factors_are_exact_sums():
    """Rows in another order: the same bits; without the pass they differ."""
    rows = x(300, 6) * 2.0 ** torch.arange(300)[:, None].remainder(20)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))

    def function(a, w, scale, bias):
        return (F.linear(a, w, bias) * scale + bias).square()

    def gradients(index, config):
        torch._dynamo.reset()
        parameters = [t.clone().requires_grad_() for t in (x(6, 6), W, x(6, seed=4))]
        call = Rewritten(function, config, aot=True)
        return torch.autograd.grad(call(rows[index], *parameters), parameters, torch.ones(300, 6))

    natural = torch.arange(300)
    assert differing(gradients(natural, CONFIG), gradients(order, CONFIG)) == 0
    single = HealConfig(outputs="fp32")
    assert differing(gradients(natural, single), gradients(order, single)) > 0


def test_a_trained_embedding_and_an_expansion_have_exact_gradients():
    """Tokens in another order: the same bits; without the pass they differ."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (300,), generator=generator)
    weights = x(300, 4) * 2.0 ** torch.arange(300)[:, None].remainder(20)
    order = torch.randperm(300, generator=generator)

    def function(ids, weights, table, row):
        return (F.embedding(ids, table, padding_idx=2) + row.expand(300, 4)) * weights

    def gradients(index, config):
        torch._dynamo.reset()
        parameters = [t.clone().requires_grad_() for t in (x(9, 4), x(1, 4, seed=4))]
        call = Rewritten(function, config, aot=True)
        result = call(ids[index], weights[index], *parameters)
        return torch.autograd.grad(result, parameters, torch.ones(300, 4)), call

    natural = torch.arange(300)
    first, call = gradients(natural, CONFIG)
    assert call.kept == {}
    assert differing(gradients(order, CONFIG)[0], first) == 0
    assert (first[0][2] == 0).all()
    exact = torch.zeros(9, 4, dtype=torch.float64).index_add_(0, ids, weights.double())
    exact[2] = 0
    assert differing(first[0], exact.float()) == 0  # FP64 holds these sums
    single = HealConfig(outputs="fp32")
    assert differing(gradients(natural, single)[0], gradients(order, single)[0]) > 0


def test_an_embedding_that_is_not_trained_stays():
    table = x(9, 4)
    frozen = Rewritten(lambda i: F.embedding(i, table), CONFIG)
    frozen(torch.tensor([1, 1, 3]))
    assert frozen.kept == {}
    assert "heal::embedding" not in map(heal_name, frozen.graphs[0].graph.nodes)


def test_a_tied_weight_has_the_same_bits_whether_or_not_it_requires_gradients():
    """In a model that is only run: without gradients nothing is upcast for their sake."""
    table = torch.nn.Parameter(x(9, 6).bfloat16())

    def function(ids):
        return F.linear(F.embedding(ids, table), table)

    results = []
    for trained in (True, False):
        torch._dynamo.reset()
        table.requires_grad_(trained)
        with torch.no_grad():
            call = Rewritten(function, CONFIG)
            results.append(call(torch.tensor([1, 1, 3])))
        (graph,) = call.graphs
        (linear,) = (n for n in graph.graph.nodes if heal_name(n) == "heal::linear")
        assert value(linear.args[1]).dtype == torch.bfloat16
    assert differing(*results) == 0


def test_infinities_in_an_embeddings_gradient():
    grad = torch.tensor([[1.0, INF, INF, NAN], [2.0, 1.0, -INF, 1.0], [4.0, 4.0, 4.0, 4.0]])
    found = torch.ops.heal.scatter_rows(grad, torch.tensor([1, 1, 0]), 3, -1)
    expected = torch.tensor([[4.0] * 4, [3.0, INF, NAN, NAN], [0.0] * 4])
    assert differing(found, fp64.canonical(expected)) == 0


def test_attention_with_a_window_a_cap_and_sinks_is_rewritten():
    q, sinks = x(1, 2, 6, 8), x(2)

    def function(q, sinks):
        return torch.ops.heal.sdpa(
            q, q, q, is_causal=True, window=3, softcap=2.0, sinks=sinks, kv="int16"
        )

    rewritten = Rewritten(function, CONFIG)
    torch._dynamo.reset()
    again = Rewritten(
        function, HealConfig(precision="exact", outputs="fp32", debug={"simulate": "h100"})
    )
    assert differing(again(q, sinks), rewritten(q, sinks)) == 0
    assert rewritten.kept == {}
