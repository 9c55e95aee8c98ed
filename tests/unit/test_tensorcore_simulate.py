"""The fast simulation equals the scalar reference, bit for bit; compiled equals eager."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from healpass.arithmetic.formats import FORMATS
from healpass.tensorcore import RULES, Schedule, simulate_matmul
from healpass.tensorcore.reference import reference_dot
from tests.support.profiles import examples

TENSOR_CORES = ("v100", "a100", "h100", "b200")


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.nan_to_num(1e30, 2e30, -2e30), y.nan_to_num(1e30, 2e30, -2e30))


def reference(a_pieces, b_pieces, rule, schedule):
    fmt = FORMATS[a_pieces[0].dtype]
    m, n = a_pieces[0].shape[0], b_pieces[0].shape[1]
    columns = [
        [(a[i].tolist(), b[:, j].tolist()) for a, b in zip(a_pieces, b_pieces, strict=True)]
        for i in range(m)
        for j in range(n)
    ]
    values = [reference_dot(pairs, RULES[rule], schedule, fmt) for pairs in columns]
    return torch.tensor(values, dtype=torch.float64).reshape(m, n).float()


def values(shape, dtype, spread, seed):
    """Log-uniform magnitudes with zeros, subnormals and, for BF16, numbers near overflow."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 2.0 ** ((2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * spread)
    x = torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, x)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


CASES = st.fixed_dictionaries(
    {
        "rule": st.sampled_from([*TENSOR_CORES, "sgemm"]),
        "dtype": st.sampled_from([torch.float16, torch.bfloat16]),
        "shape": st.tuples(st.integers(1, 2), st.integers(1, 140), st.integers(1, 2)),
        "spread": st.sampled_from([1, 8, 24, 120]),
        "pieces": st.integers(1, 3),
        "tile_k": st.sampled_from([16, 32, 64]),
        "promote_every": st.sampled_from([16, 32, 64, 128, None]),
        "order": st.integers(0, 9),
        "split_k": st.integers(1, 3),
        "seed": st.integers(0, 2**16),
    }
)


def check_against_reference(case):
    m, k, n = case["shape"]
    schedule = Schedule(**{f: case[f] for f in ("tile_k", "promote_every", "order", "split_k")})
    a = [
        values((m, k), case["dtype"], case["spread"], case["seed"] + 2 * i)
        for i in range(case["pieces"])
    ]
    b = [
        values((k, n), case["dtype"], case["spread"], case["seed"] + 2 * i + 1)
        for i in range(case["pieces"])
    ]
    fast = simulate_matmul(a, b, case["rule"], schedule)
    assert same_bits(fast, reference(a, b, case["rule"], schedule))


@examples(300)
@given(CASES)
def test_simulation_equals_the_scalar_reference(case):
    check_against_reference(case)


def test_another_rule_gives_other_bits():
    """The reference tells generations apart, so the equality above is not vacuous."""
    a, b = values((4, 128), torch.float16, 4, 0), values((128, 4), torch.float16, 4, 1)
    results = {rule: simulate_matmul([a], [b], rule) for rule in ("v100", "a100", "h100", "sgemm")}
    for left, right in itertools.combinations(results.values(), 2):
        assert not torch.equal(left, right)
    assert torch.equal(results["h100"], simulate_matmul([a], [b], "b200"))
    assert torch.equal(results["a100"], simulate_matmul([a], [b], "ada"))


@pytest.mark.parametrize(
    "knob",
    [
        {"order": 3},
        {"split_k": 2},
        {"promote_every": 16},
        {"promote_every": 128},
        {"promote_every": None},
        {"tile_k": 32},
    ],
)
def test_each_knob_of_the_schedule_is_numerics(knob):
    a = [values((8, 512), torch.float16, 2, seed) for seed in (0, 1)]
    b = values((512, 8), torch.float16, 2, 2)
    assert not torch.equal(
        simulate_matmul(a, [b, b], "a100", Schedule.of("a100", **knob)),
        simulate_matmul(a, [b, b], "a100"),
    )


def check_compiled(rule, dtype=torch.float16, spread=6):
    """One compiled program serves every shape: sizes of one, lengths that do not divide."""
    for m, k, n in ((3, 80, 5), (1, 16, 1), (9, 130, 600)):
        a = [values((m, k), dtype, spread, seed) for seed in (0, 1)]
        b = values((k, n), dtype, spread, 2)
        fast = simulate_matmul(a, [b, b], rule, compiled=True)
        assert same_bits(fast, simulate_matmul(a, [b, b], rule, compiled=False))


def test_compiled_equals_eager():
    check_compiled("h100")


@pytest.mark.deep
@pytest.mark.parametrize("spread", [6, 120])
@pytest.mark.parametrize("rule", ["v100", "a100", "h100", "sgemm"])
def test_compiled_equals_eager_deep(rule, spread):
    """In FP32 and, where the numbers do not fit, in FP64."""
    check_compiled(rule, torch.bfloat16, spread)


@pytest.mark.deep
def test_compiled_equals_eager_without_a_fused_multiply_add(monkeypatch):
    monkeypatch.setattr("healpass.tensorcore.simulate._fused_step", lambda: None)
    check_compiled("sgemm", torch.bfloat16, 120)


@pytest.mark.parametrize("rule", [*TENSOR_CORES, "sgemm", "exact"])
def test_non_finite_operands_and_overflow(rule):
    inf, nan = math.inf, math.nan
    a = torch.tensor([[inf, 1.0], [nan, 0.0], [inf, -inf], [0.0, 1.0], [3e38, 3e38]]).bfloat16()
    b = torch.tensor([[1.0, 0.0, 3e38], [1.0, 1.0, 3e38]]).bfloat16()
    y = simulate_matmul([a], [b], rule)
    want = torch.tensor(
        [[inf, nan, inf], [nan, nan, nan], [nan, nan, nan], [1.0, 1.0, 3e38], [inf, 3e38, inf]]
    )
    assert same_bits(y[:4], want[:4].bfloat16().float())
    assert y[4, 0] == y[4, 2] == inf


def test_subnormal_results_are_kept():
    a = torch.full((1, 3), 2.0**-70).bfloat16()
    b = torch.full((3, 1), 2.0**-75).bfloat16()
    for rule in (*TENSOR_CORES, "sgemm"):
        assert simulate_matmul([a], [b], rule).item() == 3 * 2.0**-145


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_zero_sizes(shape):
    m, k, n = shape
    y = simulate_matmul([torch.ones(m, k).half()], [torch.ones(k, n).half()], "h100")
    assert torch.equal(y, torch.zeros(m, n))


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_layouts(layout):
    a, b = values((20, 6), torch.float16, 3, 0), values((20, 4), torch.float16, 3, 1)
    a = a.t() if layout == "transposed" else a[:, 0].expand(6, 20)
    assert torch.equal(
        simulate_matmul([a], [b], "a100"), simulate_matmul([a.contiguous()], [b], "a100")
    )


def test_what_is_refused():
    half, bf16 = torch.ones(2, 4).half(), torch.ones(4, 2).bfloat16()
    with pytest.raises(ValueError, match="operands of one dtype"):
        simulate_matmul([half], [bf16], "a100")
    with pytest.raises(ValueError, match=r"float32.*a100|a100.*float32"):
        simulate_matmul([half.float()], [bf16.float()], "a100")
    with pytest.raises(ValueError, match="1 left and 2 right"):
        simulate_matmul([half], [half.t(), half.t()], "a100")
    with pytest.raises(ValueError, match="tile_k=24"):
        Schedule(tile_k=24)
    with pytest.raises(ValueError, match="promote_every=96"):
        Schedule(promote_every=96)
    with pytest.raises(ValueError, match="promote_every=8"):
        Schedule(promote_every=8)
    with pytest.raises(ValueError, match="split_k=0"):
        Schedule(split_k=0)


@given(
    st.integers(0, 1000),
    st.sampled_from([16, 64]),
    st.sampled_from([16, 32, 128, None]),
    st.integers(1, 5),
    st.integers(0, 5),
)
def test_a_schedule_visits_every_term_once(k, tile_k, promote_every, split_k, order):
    splits = Schedule(tile_k, promote_every, order, split_k).splits(k)
    chains = [chain for steps in splits for step in steps for chain in step]
    visited = [i for chain in chains for dot in chain for i in dot]
    assert sorted(visited) == list(range(k))
    assert len(splits) <= split_k
    longest = max((sum(map(len, chain)) for chain in chains), default=0)
    assert longest <= (promote_every or k)


@pytest.mark.parametrize("rule", TENSOR_CORES)
def test_a_chain_is_four_additions_of_the_hardware(rule):
    """Chains of a tile make their own sum first, so that the register rounds once per tile."""
    how = RULES[rule]
    assert how.promote_every == 4 * how.group
    (steps,) = Schedule(promote_every=how.promote_every).splits(576)
    assert [len(chains) for chains in steps] == [64 // how.promote_every] * 9
    a, b = values((3, 200), torch.float16, 4, 0), values((200, 3), torch.float16, 4, 1)
    by_hand = simulate_matmul([a], [b], rule, Schedule(promote_every=4 * how.group))
    assert torch.equal(simulate_matmul([a], [b], rule), by_hand)
