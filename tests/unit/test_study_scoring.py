"""Scores, margins, seeded samples, stand-in sums and sketches: the study's small arithmetic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from healpass.errors import StudyError
from healpass.study.judge.blame import FAULT, Blame, Deviation, deviation
from healpass.study.judge.flip_rate import compare_logits
from healpass.study.plan.configuration import Configuration
from healpass.study.report.tables import suspicion
from healpass.study.run.baselines import Products, attention, linear, multiplier
from healpass.study.run.generate import SeededNoise, pad, until_end
from healpass.study.run.score import Text, greedy_output, margins, score, scores_of
from healpass.study.run.traces import BUCKETS, Sketch


def logits_pair(seed, tokens, vocabulary, noise):
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(tokens, vocabulary, generator=generator).bfloat16().float()
    other = one + noise * torch.randn(tokens, vocabulary, generator=generator)
    return one, other.bfloat16().float()


@given(st.integers(0, 999), st.integers(1, 9), st.integers(2, 7), st.sampled_from([0.0, 0.1, 3.0]))
def test_margins_from_scores_are_those_of_the_logits(seed, tokens, vocabulary, noise):
    one, other = logits_pair(seed, tokens, vocabulary, noise)
    reference = scores_of(one)
    found, expected = margins(reference, scores_of(other, reference)), compare_logits(one, other)
    assert torch.equal(found.gap, expected.gap)
    assert torch.equal(found.shift, expected.shift)
    assert torch.equal(found.flipped, expected.flipped)


def test_fewer_tokens_are_compared_with_the_first_of_the_reference():
    one, other = logits_pair(1, 6, 5, 0.5)
    reference = scores_of(one)
    found = margins(reference, scores_of(other[:4], reference))
    assert torch.equal(found.shift, compare_logits(one[:4], other[:4]).shift)


def test_an_output_ends_with_its_first_difference():
    logits = torch.eye(4)[[2, 3, 1, 0]]
    scores = scores_of(logits)
    assert greedy_output(scores, (2, 3, 1, 0)).tokens == (2, 3, 1, 0)
    assert greedy_output(scores, (2, 0, 1, 0)).tokens == (2, 3)
    assert greedy_output(scores_of(logits[:0]), ()).tokens == ()


class Echo:
    """A model whose logits say which token stood there, whatever the padding."""

    def __init__(self, broken=False):
        self.broken = broken

    def __call__(self, input_ids, attention_mask, position_ids, **_):
        logits = torch.nn.functional.one_hot(input_ids, 9).float()
        logits = logits * attention_mask[..., None] + position_ids[..., None]
        return type("Result", (), {"logits": logits * (math.nan if self.broken else 1)})


TEXTS = [Text((1, 2, 3), (4, 5)), Text((6,), (7, 8, 1)), Text((2, 2), ())]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_scores_the_same_tokens(side):
    batched = score(Echo(), TEXTS, padding_id=0, side=side)
    alone = [score(Echo(), [text], padding_id=0)[0] for text in TEXTS]
    for one, other, text in zip(batched, alone, TEXTS, strict=True):
        # The logits of a position belong to the token after it.
        assert (
            one.top[:, 0].tolist()
            == [*text.prompt, *text.answer][len(text.prompt) - 1 : -1][: len(text.answer)]
        )
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.digest, other.digest)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(StudyError, match="NaN or infinite"):
        score(Echo(broken=True), TEXTS[:1], padding_id=0)


def test_noise_belongs_to_the_request_and_not_to_the_batch():
    logits = torch.zeros(3, 50)
    together, alone = SeededNoise((7, 8, 9)), SeededNoise((8,))
    for _ in range(3):
        assert torch.equal(together(None, logits)[1], alone(None, logits[:1])[0])


def test_the_best_of_noisy_logits_is_a_sample_of_their_softmax():
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    count = 4000
    drawn = SeededNoise(range(count))(None, probabilities.log().expand(count, 3)).argmax(-1)
    share = torch.bincount(drawn, minlength=3) / count
    # Five standard deviations of a binomial share; the seeds are fixed.
    bound = 5 * (probabilities * (1 - probabilities) / count).sqrt()
    print((share - probabilities).abs() / bound)
    assert ((share - probabilities).abs() <= bound).all()


def test_rows_are_padded_on_the_side_asked_for():
    ids, mask = pad([[1, 2], [3]], 0, "left")
    assert ids.tolist() == [[1, 2], [0, 3]]
    assert mask.tolist() == [[1, 1], [0, 1]]
    assert pad([[1, 2], [3]], 0, "right")[0].tolist() == [[1, 2], [3, 0]]
    assert until_end([4, 1, 1], [1]) == (4, 1)
    assert until_end([4, 5], [1]) == (4, 5)


def integers(*shape, seed=0):
    """Small integers: every order of summation gives their products exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("gpu", "order"), [(None, 1), ("h100", 0), ("h100", 2)])
def test_stand_in_sums_of_integers_are_exact(dtype, gpu, order):
    x, w = integers(2, 3, 40).to(dtype), integers(5, 40, seed=1).to(dtype)
    bias = integers(5, seed=2).to(dtype)
    expected = (x.double() @ w.double().t() + bias.double()).to(dtype)
    found = linear(multiplier(gpu, order), x, w, bias)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_stand_in_attention_means_what_torchs_does(mask, groups):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, 4 // groups, 5, 8, generator=generator) for _ in range(2))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    options = {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": seen},
        "additive": {"attn_mask": torch.zeros(5, 5).masked_fill(~seen, -math.inf)},
    }[mask] | {"enable_gqa": groups > 1, "scale": 0.3}
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(),
        **options | ({"attn_mask": options["attn_mask"].double()} if mask == "additive" else {}),
    )  # fmt: skip
    found = attention(Products(torch.matmul, torch.matmul), query, key, value, **options)
    # u = 2^-24. Scores of 8 terms, times a scale: 9u max|q.k| nats; softmax a few u more; then 5
    # terms of V. To first order the error is below (2 * 9 * max|scores| + 16) u * max|V|.
    scores = 0.3 * float((query.abs().amax() * key.abs().amax()) * 8)
    bound = (18 * scores + 16) * 2**-24 * float(value.abs().amax())
    ratio = float((found.double() - exact).abs().amax()) / bound
    print(f"observed / bound: {ratio:.2e}")
    assert ratio <= 1


def test_another_order_is_another_sum():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 300, generator=generator), torch.randn(6, 300, generator=generator)
    one, other = (linear(multiplier(None, order), x, w) for order in (1, 2))
    assert not torch.equal(one, other)


@given(st.integers(0, 10_000), st.integers(1, 3000), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_a_sketch_keeps_distances(seed, size, distance):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(size, generator=generator, dtype=torch.float64)
    other = value + distance * torch.randn(size, generator=generator, dtype=torch.float64)
    found = Sketch.of(value).deviation(Sketch.of(other))
    true = float((other - value).norm() / value.norm())
    # The squared estimate has a relative deviation of sqrt(2/64); six of them.
    bound = 6 * math.sqrt(2 / BUCKETS)
    ratio = abs(found**2 / true**2 - 1) / bound
    print(f"observed / bound: {ratio:.2e}")
    assert ratio <= 1


@pytest.mark.parametrize(
    "value", [torch.tensor([math.inf, 1.0]), torch.empty(0), torch.tensor(2.0)]
)
def test_a_sketch_of_odd_values_is_finite(value):
    sketch = Sketch.of(value)
    assert Sketch.from_dict(sketch.to_dict()) == sketch
    assert math.isfinite(sketch.norm)
    assert sketch.deviation(sketch) == 0


def test_deviations_of_odd_values():
    x = torch.tensor([[3.0, 4.0]])
    assert deviation(x, x) == 0
    assert deviation(x, x.repeat(4, 1)) == 0
    assert deviation(x, torch.tensor([[3.0, 4.0], [3.0, 4.5]])) == 0.5 / 5
    hidden = torch.tensor([-math.inf, 1.0])
    assert deviation(hidden, hidden) == 0
    assert deviation(torch.zeros(2), torch.ones(2)) == math.inf
    assert deviation(x, torch.tensor([[3.0, math.nan]])) == math.inf


def made(shares, precision="fp32"):
    c = Configuration(precision=precision)
    return Blame(c, c, tuple(Deviation(name, own, own) for name, own in shares.items()))


def layers(share, count=4):
    return {f"model.layers.{i}.mlp.up_proj": share * (1 + i / 10) for i in range(count)}


def test_an_operation_far_above_its_peers_is_the_suspect():
    shares = layers(1e-7) | {"model.layers.2.mlp.up_proj": 1e-3, "lm_head": 2e-7}
    assert made(shares).suspect.operation == "model.layers.2.mlp.up_proj"
    assert made(shares).largest.operation == "model.layers.2.mlp.up_proj"


def test_the_terminal_says_below_what_a_fault_goes_unseen():
    shares = layers(1e-3) | {"lm_head": 1e-3}
    assert suspicion(made(shares, "bf16")) == "; no suspect above one rounding, 0.00781"
    assert suspicion(made(shares, "fp32")) == ""
    assert suspicion(made(dict.fromkeys(shares, 0.0), "bf16")) == ""
    faulty = shares | {"model.layers.2.mlp.up_proj": 1.0}
    assert suspicion(made(faulty, "bf16")) == "; SUSPECT: model.layers.2.mlp.up_proj"


def test_roundings_make_no_suspect():
    assert made(layers(1e-7) | {"lm_head": 1e-7 * FAULT / 2}).suspect is None
    assert made(dict.fromkeys(layers(1), 0.0)).suspect is None
    assert made({}).first is None


@pytest.mark.parametrize(("precision", "unit"), [("bf16", 2**-7), ("fp16", 2**-10)])
def test_what_one_rounding_of_the_format_explains_is_no_fault(precision, unit):
    for share, is_fault in ((unit, False), (2 * unit, True)):
        shares = layers(1e-7) | {"model.layers.2.mlp.up_proj": share}
        assert (made(shares, precision).suspect is not None) == is_fault


def test_the_only_operation_that_differs_is_the_suspect():
    shares = dict.fromkeys(layers(1), 0.0) | {"model.layers.1.mlp.up_proj": 1e-3}
    assert made(shares).suspect.operation == "model.layers.1.mlp.up_proj"
    assert Blame.from_dict(made(shares).to_dict()) == made(shares)
