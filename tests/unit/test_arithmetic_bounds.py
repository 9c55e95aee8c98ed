"""The formulas themselves: FP32-equivalence proved, tightness, terms, texts, refusals."""

import pytest
import sympy
import torch
from sympy import Rational

from healpass.arithmetic import unit_roundoff
from healpass.arithmetic.attention_bounds import AttentionShape, attention_bound
from healpass.arithmetic.bounds import HARDWARE, Kernel, matmul_bound, matmul_magnitudes
from healpass.arithmetic.formats import FORMATS
from healpass.arithmetic.symbols import SA, SB, A, B, Bound, S, U
from healpass.tensorcore import RULES, heal_matmul
from tests.support.against_torch import chance

GENERATIONS = ("v100", "a100", "h100", "b200")
#: From this K on, twice the FP32 chain's bound is promised on every generation.
PROMISED_FROM = 22


def coefficients(k, rule):
    """S's exact rational coefficient, and those of the normwise terms."""
    bound = matmul_bound("heal", k, rule=rule)
    polynomial = sympy.Poly(sympy.expand(bound.expression), S, A, B, SA, SB)
    return polynomial.coeff_monomial(S), [
        polynomial.coeff_monomial(A * SB), polynomial.coeff_monomial(B * SA)
    ]  # fmt: skip


@pytest.mark.parametrize("rule", GENERATIONS)
def test_heal_is_at_most_twice_the_fp32_chain(rule):
    """Exact rational arithmetic for each K near the start, then a line for the rest.

    For K >= 64 chains and tiles are full and only the register's additions depend on K: they are n
    = ceil(K / 64) - 1 <= K / 64 more than at K = 64. While all are below u^-1 / 4, their term is
    at most (1 + 4 h) 2 n u <= K u / 16. So heal <= c + K u / 16 with c its value at K = 64, and
    2 K u - K u / 16 grows with K.
    """
    for k in range(PROMISED_FROM, 64 + 129):
        value, normwise = coefficients(k, rule)
        assert value <= 2 * k * U, f"K={k}: {float(value / (k * U)):.3f} K u"
        assert all(c <= Rational(1, 2**40) * (1 + Rational(1, 2**4)) for c in normwise)
    constant = coefficients(64, rule)[0]
    k = sympy.Symbol("k", positive=True)
    slack = 2 * k * U - (constant + k * U / 16)
    assert sympy.diff(slack, k) > 0
    assert slack.subs(k, 64) >= 0
    for k in (1000, 14336, 2**20):
        assert coefficients(k, rule)[0] <= constant + k * U / 16


def test_where_the_promise_starts_is_later_for_coarser_generations():
    """The least K from which it holds; the promise is the latest of them."""
    least = {}
    for rule in GENERATIONS:
        fails = [k for k in range(1, 129) if coefficients(k, rule)[0] > 2 * k * U]
        least[rule] = max(fails, default=0) + 1
    print(least)
    assert least["h100"] == least["b200"] < least["a100"] < least["v100"] == PROMISED_FROM


def test_every_generation_has_the_same_bound_of_a_chain():
    """Four additions each: 32 u by aligning and 8 u by chopping, of the high product alone."""
    for rule in GENERATIONS:
        chain = HARDWARE[rule].promote_every
        bound = matmul_bound("heal", chain, left="bf16", right="bf16", rule=rule)
        parts = {term.lemma: term.expression.coeff(S) / U for term in bound.terms}
        assert (parts["align"], parts["chop"], parts["promote"]) == (32, 8, 0)


def test_without_promotion_the_promise_breaks():
    bound = matmul_bound("heal", 14336, rule="h100", kernel=Kernel(promote_every=None)).expression
    chain = sympy.Poly(sympy.expand(bound), S, A, B, SA, SB).coeff_monomial(S)
    assert chain > 16 * matmul_bound("heal", 14336, rule="h100").expression.coeff(S)


def test_bounds_and_simulation_speak_of_the_same_hardware():
    for name, hardware in HARDWARE.items():
        rule = RULES.get(name)
        if rule is not None and rule.kind == "truncate":
            assert (rule.group, rule.fraction_bits) == (hardware.group, hardware.fraction_bits)
            assert rule.promote_every == hardware.promote_every


@pytest.mark.parametrize("rule", [*GENERATIONS, "fp32", None])
def test_tightness_on_gaussian_data(rule):
    """Median observed / probabilistic bound above 0.01, none of ten thousand above 1."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(100, 576, generator=generator)
    b = torch.randn(576, 100, generator=generator).bfloat16()
    y = a @ b.float() if rule is None else heal_matmul(a, b, rule)
    error = (y.double() - a.double() @ b.double()).abs()
    bound = matmul_bound("heal", 576, rule=rule)
    ratio = error / bound.evaluate_probabilistic(**matmul_magnitudes(a, b))
    print(f"{rule}: median {ratio.median():.3f}, worst {ratio.max():.3f}")
    assert 0.01 < ratio.median() < ratio.max() <= 1


@pytest.mark.parametrize("rule", GENERATIONS)
def test_long_reductions_are_as_good_as_fp32(rule):
    """Synthetic data, K up to 14336: not above the error of an FP32 matmul by more than chance.

    (Below some 10 rows MKL keeps more partial sums and errs half as much.)
    """
    for k in (576, 1536, 4096, 14336):
        generator = torch.Generator().manual_seed(1)
        a = torch.randn(12, k, generator=generator)
        b = (torch.randn(k, 8, generator=generator) * 0.02).bfloat16()
        exact = a.double() @ b.double()
        heal, fp32 = (
            ((y.double() - exact).norm() / exact.norm()).item()
            for y in (heal_matmul(a, b, rule), a @ b.float())
        )
        print(f"{rule}, K={k}: heal {heal:.2e}, FP32 {fp32:.2e}")
        assert heal <= chance(exact.numel()) * fp32


def test_a_bound_says_what_it_is_made_of():
    bound = matmul_bound("heal", 576, left="fp32", right="fp32", rule="h100")
    lemmas = [term.lemma for term in bound.terms]
    assert lemmas == ["split", "dropped", "align", "chop", "promote", "underflow"]
    assert bound.text.startswith("56.2u S + 2^-39.9 A*SB")
    assert matmul_bound("layercast", 576).text == "576.1u S + tiny"
    assert matmul_bound("heal", 576).expression == matmul_bound("layercast", 576).expression


def test_a_result_rounded_to_16_bits_has_16_bits_of_error():
    for name, u16 in (("bf16", 2.0**-8), ("fp16", 2.0**-11)):
        ones = {"S": 1.0, "A": 1.0, "B": 1.0, "SA": 1.0, "SB": 1.0}
        assert u16 < matmul_bound(name, 64).evaluate(**ones) < 1.01 * u16


@pytest.mark.parametrize("k", [0, 1])
def test_empty_and_single_products_have_bounds(k):
    bound = matmul_bound("heal", k, rule="v100")
    magnitudes = matmul_magnitudes(torch.ones(2, k), torch.ones(k, 3))
    assert bound.evaluate(**magnitudes) is not None


def test_headroom_doubles_what_a_tiny_element_loses():
    """A row scale that maps the maximum to [2^14, 2^15) needs the bound of one bit of headroom."""
    a, b = torch.tensor([[1.0, 2.0**-39 * (1 - 2.0**-13)]]), torch.tensor([[0.0], [1.0]])
    scaled = a * 2.0**14
    high = scaled.half()
    low = (scaled - high.float()).half()
    value = (high.double() + low.double()) / 2.0**14
    error = (value @ b.double() - a.double() @ b.double()).abs()
    normwise = {"S": 0.0, "B": 0.0, "SA": 0.0, "A": a.max().item(), "SB": 1.0}
    bounds = [
        matmul_bound("heal", 2, rule="h100", kernel=Kernel(headroom=bits)) for bits in (0, 1)
    ]
    tight, loose = (bound.evaluate(**normwise) for bound in bounds)
    assert tight < error < loose
    assert 1.9 < loose / tight < 2.1


def test_what_has_no_bound_is_refused():
    with pytest.raises(ValueError, match="no error bound for precision='exact'"):
        matmul_bound("exact", 64)
    with pytest.raises(ValueError, match="rule='k80'"):
        matmul_bound("heal", 64, rule="k80")
    with pytest.raises(ValueError, match="kv='int8'"):
        attention_bound(AttentionShape(64, 10, kv="int8"))
    with pytest.raises(ValueError, match="no probabilistic companion"):
        Bound("none", ()).evaluate_probabilistic()


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_formats_are_torchs(dtype):
    fmt, info = FORMATS[dtype], torch.finfo(dtype)
    assert (fmt.largest, fmt.smallest_normal) == (info.max, info.smallest_normal)
    assert unit_roundoff(dtype) == info.eps / 2
    assert fmt.smallest_subnormal == info.smallest_normal * info.eps


CURVED = [
    ("sigmoid", {}, 0.0963),
    ("tanh", {}, 0.77),
    ("silu", {}, 0.5),
    ("gelu", {"approximate": "none"}, 0.798),
    ("gelu", {"approximate": "tanh"}, 0.798),
]


@pytest.mark.parametrize(("name", "options", "curvature"), CURVED)
def test_no_function_is_more_curved_than_its_rule_says(name, options, curvature):
    """f'' by autograd on a fine grid, which its own smoothness makes representative."""
    function = getattr(torch.nn.functional, name)
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(function(x, **options).sum(), x, create_graph=True)[0]
    found = torch.autograd.grad(slope.sum(), x)[0].abs().max().item()
    print(f"{name}: {found:.6f}")
    assert 0.99 * curvature < found <= curvature
