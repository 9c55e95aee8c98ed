"""Integer attention: the same bits for every tiling, padding and generation; within bounds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import healpass.ops  # noqa: F401
from healpass.arithmetic.int16 import round_trip
from healpass.ops.attention import exact_steps
from healpass.ops.attention.quantize import FORMATS, Integers
from healpass.ops.attention.scoring import Scoring
from tests.support.bits import differing
from tests.support.exact_gpu import integer_states

heal = torch.ops.heal
GENERATIONS = ("v100", "a100", "h100", "b200")
INF, NAN = float("inf"), float("nan")


def states(length: int = 9, keys: int = 9, heads: int = 4, groups: int = 2, size: int = 16):
    """Q, K and V with rows of very different magnitude, as real caches have."""
    generator = torch.Generator().manual_seed(length + keys)

    def make(h, s):
        x = torch.randn(2, h, s, size, generator=generator)
        return x * 2.0 ** torch.randint(-3, 4, (2, h, s, 1), generator=generator)

    return make(heads, length), make(heads // groups, keys), make(heads // groups, keys)


def attend(q, k, v, mask=None, **options):
    options = {"kv": "int16", "numerics": "exact5"} | options
    return heal.sdpa(q, k, v, mask, enable_gqa=True, **options)


@pytest.mark.parametrize("kv", ["int16", "int24"])
@pytest.mark.parametrize("causal", [False, True])
def test_generations_orders_and_routes_agree(kv, causal):
    q, k, v = states()
    first = attend(q, k, v, is_causal=causal, kv=kv)
    for seed, rule in enumerate(GENERATIONS):
        numerics = f"exact5:{rule}:{seed}"
        assert differing(attend(q, k, v, is_causal=causal, kv=kv, numerics=numerics), first) == 0


def reference(q, k, v, mask, kv):
    """FP64 attention of the rounded values, and what one unit of P in fixed point is worth."""
    q, k, v = (round_trip(x, FORMATS[kv]).double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -INF)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    largest = v.abs().amax((-1, -2), keepdim=True)
    return weights @ v / total, largest * 2.0**-21 * k.shape[2] / total


@pytest.mark.parametrize("kv", ["int16", "int24"])
@pytest.mark.parametrize("keys", [1, 9, 300])
def test_error_is_within_its_bound(kv, keys):
    q, k, v = states(5, keys)
    mask = torch.rand(5, keys, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[:, 0] = True
    exact, bound = reference(q, k, v, mask, kv)
    error = (attend(q, k, v, mask, kv=kv).double() - exact).abs()
    bound = bound + exact.abs() * 2.0**-24
    print(f"{kv}, {keys} keys: observed/bound {float((error / bound).max()):.4f}")
    assert (error <= bound).all()


def test_decode_chunks_and_prefill_agree():
    """Row by row with what was there then, in chunks, or at once under a causal mask."""
    q, k, v = states(12, 12)
    whole = attend(q, k, v, is_causal=True)
    for chunk in (1, 5, 7):
        for start in range(0, 12, chunk):
            stop = min(start + chunk, 12)
            mask = torch.ones(stop, stop, dtype=torch.bool).tril()[start:stop]
            part = attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask)
            assert differing(part, whole[:, :, start:stop]) == 0


@pytest.mark.parametrize("padding", [(0, 5), (4, 0), (3, 70)])
@pytest.mark.parametrize("filler", [0.0, 1e30, NAN])
def test_hidden_keys_do_not_show_whatever_they_hold(padding, filler):
    q, k, v = states(3, 9)
    left, right = padding
    mask = F.pad(torch.ones(3, 9, dtype=torch.bool), (left, right), value=False)
    wide_k, wide_v = (F.pad(x, (0, 0, left, right), value=filler) for x in (k, v))
    first = attend(q, k, v)
    assert differing(attend(q, wide_k, wide_v, mask), first) == 0
    added = torch.where(mask, 0.0, -INF)
    assert differing(attend(q, wide_k, wide_v, added), first) == 0


def test_keys_may_come_in_any_order_and_batches_in_any_size():
    q, k, v = states(3, 40)
    first = attend(q, k, v)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert differing(attend(q, k[:, :, order], v[:, :, order]), first) == 0
    assert differing(attend(q[1:], k[1:], v[1:]), first[1:]) == 0
    groups = (x.repeat_interleave(2, 1) for x in (k, v))
    assert differing(attend(q, *groups), first) == 0


def test_floating_point_attention_does_depend_on_the_order_of_keys():
    """The inverse: torch's FP32 attention fails the check above."""
    q, k, v = states(3, 40, groups=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    sdpa = F.scaled_dot_product_attention
    assert differing(sdpa(q, k[:, :, order], v[:, :, order]), sdpa(q, k, v)) > 0


def test_a_common_exponent_over_hidden_keys_would_show():
    """The inverse: the fixed point must follow the visible keys only."""
    v = states(1, 9)[2]
    scale = Integers.of(v, "int16").scale.double().repeat_interleave(2, 1)[:, :, None]
    scale[..., 4] *= 2.0**12
    visible = (torch.arange(9) != 4).expand_as(scale)
    weights = torch.full_like(scale, 0.123)
    kept, exponent = exact_steps._fixed_point(weights, scale, visible)
    wrong, other = exact_steps._fixed_point(weights, scale, torch.ones_like(visible))
    values = [
        (p.double() * 2.0 ** e.double())[visible]
        for p, e in ((kept, exponent - exact_steps.P_BITS), (wrong, other - exact_steps.P_BITS))
    ]
    assert not torch.equal(*values)


def test_special_rows():
    q, k, v = states(3, 9)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    assert (attend(q, k, v, mask)[:, :, 1] == 0).all()
    for name in ("q", "k", "v"):
        broken = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        broken[name][0, 0, 2, 3] = INF
        result = attend(**broken)
        if name == "q":
            assert result[0, 0, 2].isnan().all()
            assert result[0, 0, :2].isfinite().all()
        else:
            assert result[0, :2].isnan().all()
            assert result[0, 2:].isfinite().all()
        assert result[1].isfinite().all()
    zeros = attend(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    assert differing(zeros, torch.zeros_like(zeros)) == 0


@pytest.mark.parametrize("empty", ["length", "keys"])
def test_no_queries_and_no_keys(empty):
    q, k, v = states(0 if empty == "length" else 3, 0 if empty == "keys" else 4)
    result = attend(q, k, v)
    assert result.shape == q.shape
    assert (result == 0).all()


def test_more_keys_than_int64_allows_are_refused():
    keys = (1 << 17) + 1
    digits = torch.zeros(1, 1, 3, 1, 1, dtype=torch.int8)
    many = digits.expand(1, 1, 3, keys, 1)
    one, scales = torch.ones(1, 1, 1), torch.ones(1, 1, keys)
    states = (digits, one, many, scales, many, scales)
    with pytest.raises(ValueError, match="may overflow INT64"):
        heal.integer_attention(*states, *Scoring(1.0).arguments, "exact5")


@pytest.mark.parametrize("kv", ["int16", "int24"])
def test_gradients_are_exact_and_have_the_same_bits_everywhere(kv):
    q, k, v = states(6, 6)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    bias = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(4))  # of every batch
    bias.masked_fill_(torch.ones(6, 6, dtype=torch.bool).triu(1), -INF)

    def gradients(numerics, order=(0, 1)):
        q_, k_, v_ = (x[list(order)].requires_grad_() for x in (q, k, v))
        inputs = (q_, k_, v_, bias.clone().requires_grad_())
        result = attend(*inputs, kv=kv, numerics=numerics)
        return torch.autograd.grad(result, inputs, upstream[list(order)])

    first = gradients("exact8")
    for rule in GENERATIONS:
        assert differing(gradients(f"exact8:{rule}:2"), first) == 0
    assert differing(gradients("exact8", order=(1, 0))[3], first[3]) == 0  # a sum over batches
    inputs = [round_trip(x, FORMATS[kv]).double().requires_grad_() for x in (q, k, v)]
    inputs.append(bias.double().requires_grad_())
    exact = torch.autograd.grad(
        F.scaled_dot_product_attention(*inputs, enable_gqa=True),
        inputs,
        upstream.double(),
    )
    for ours, truth in zip(first, exact, strict=True):
        # Three chained products of 8 digit pairs: 2^-20 of the norm each on such data.
        assert (ours.double() - truth).norm() <= 3 * 2.0**-20 * truth.norm()


def test_what_has_no_reference_is_refused():
    q, k, v = states()
    mask = torch.ones(9, 9, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="exclude each other"):
        attend(q, k, v, mask, is_causal=True)
    with pytest.raises(ValueError, match="exact attention is one of "):
        attend(q, k, v, kv="fp32")
    digits = integer_states(q, k, v, kv="int16")
    for scoring in (Scoring(0.25, softcap=2.0), Scoring(0.25, sinks=torch.zeros(4))):
        with pytest.raises(ValueError, match="Call heal::sdpa"):
            heal.integer_attention(*digits, *scoring.arguments, "exact5")
    one = (digits[0][:, :, :1], *digits[1:])
    with pytest.raises(ValueError, match=r"of \[1, 2, 2\] digits"):
        heal.integer_attention(*one, *Scoring(0.25).arguments, "exact5")
    with pytest.raises(TypeError, match=r"got a torch\.float64 operand"):
        torch.ops.heal.silu(q.double())


@pytest.mark.parametrize(
    "shape", [(4, 9), (9, 4), (12, 9), (9, 12), (3, 1, 1, 9), (1, 1, 1, 9, 9)]
)
@pytest.mark.parametrize("numerics", ["exact5", "heal"])
@pytest.mark.parametrize("kv", ["int16", "fp32"])
def test_a_mask_of_another_size_is_refused(shape, numerics, kv):
    """A mask of a part of the queries must not be used for each block of them."""
    q, k, v = states()
    if kv == "fp32" and numerics == "exact5":
        return
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"broadcast|shape|sizes"):
        heal.sdpa(q, k, v, mask, enable_gqa=True, kv=kv, numerics=numerics)
    with pytest.raises(RuntimeError, match="does not broadcast"):
        heal.integer_attention(
            *integer_states(q, k, v, kv="int16"), *Scoring(0.25, mask).arguments, numerics
        )


@pytest.mark.parametrize("empty", ["batch", "heads", "length", "keys"])
@pytest.mark.parametrize("numerics", ["exact5", "heal"])
def test_the_gradients_of_nothing_are_zeros(empty, numerics):
    batch, heads = (0 if empty == "batch" else 2), (0 if empty == "heads" else 2)
    length, keys = (0 if empty == "length" else 3), (0 if empty == "keys" else 4)
    if numerics == "heal" and empty == "heads":
        return  # torch's reshape of no head by no head
    q = torch.randn(batch, heads, length, 8, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, 8, requires_grad=True) for _ in range(2))
    bias = torch.zeros(length, keys, requires_grad=True)
    attend(q, k, v, bias, numerics=numerics).sum().backward()
    for x in (q, k, v, bias):
        assert x.grad.shape == x.shape
        assert (x.grad == 0).all()


@pytest.mark.parametrize("kv", ["int16", "int24"])
def test_the_logsumexp_is_that_of_fp64(kv):
    q, k, v = states(5, 40)
    mask = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[2] = False
    digits = integer_states(q, k, v, kv=kv)
    call = (*digits, *Scoring(0.25, mask).arguments)
    found = heal.integer_attention(*call, "exact5")[1]
    query, key = (round_trip(x, FORMATS[kv]).double() for x in (q, k))
    scores = (query @ key.repeat_interleave(2, 1).mT / 4).masked_fill(~mask, -INF)
    exact = scores.logsumexp(-1)
    assert (found[:, :, 2] == -INF).all()
    error = (found.double() - exact)[:, :, mask.any(-1)].abs()
    # Half an ulp, dequantization of Q and K for the truth (2^-24 each), and 40 terms of 2^-41.
    size = scores.abs().masked_fill(~mask, 0.0).amax(-1)[:, :, mask.any(-1)]
    bound = exact[:, :, mask.any(-1)].abs() * 2.0**-24 + size.amax() * 2.0**-22 + 40 * 2.0**-41
    print(f"{kv}: observed/bound {float((error / bound).max()):.4f}")
    assert (error <= bound).all()
    for rule in GENERATIONS:
        assert differing(heal.integer_attention(*call, f"exact5:{rule}:3")[1], found) == 0


def test_opcheck_is_green():
    q, k, v = (x.requires_grad_() for x in states())
    digits = integer_states(*(x.detach() for x in (q, k, v)), kv="int16")
    bias = torch.zeros(9, 9)
    for scoring in (Scoring(0.25, is_causal=True, window=3), Scoring(0.25, bias)):
        call = (*digits, *scoring.arguments, "exact5")
        output, logsumexp = heal.integer_attention(*call)
        results = (torch.ones_like(output), *call, output, logsumexp)
        torch.library.opcheck(heal.integer_attention.default, call)
        torch.library.opcheck(heal.integer_attention_backward.default, results)
    torch.library.opcheck(heal.integer_attention_mask_grad.default, results)
    options = {"enable_gqa": True, "kv": "int16", "numerics": "exact5"}
    torch.library.opcheck(heal.sdpa.default, (q, k, v, bias.requires_grad_()), options)


# ------------------------------------------------------------------------ windows, caps and sinks


def extras(**given) -> dict:
    return {"window": None, "softcap": None, "sinks": None} | given


EXTRAS = {
    "window": extras(window=5),
    "softcap": extras(softcap=3.0),
    "sinks": extras(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": extras(window=4, softcap=2.5, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def extra_states(length: int = 11, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 8))
    return [torch.randn(*size, generator=generator) * 2 for size in sizes]


def in_fp64(q, k, v, window, softcap, sinks):
    """Causal attention by its definition."""
    k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = q.double() @ k.mT / 4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    hidden = (column > row) | ((column <= row - window) if window is not None else False)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(2, 4, len(row), 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


@pytest.mark.parametrize("name", EXTRAS)
def test_windows_caps_and_sinks_are_what_they_should_be(name):
    """INT24 moves q and k (16 elements) by 2^-22 of their norms, scores by twice that, weights by
    twice the score's change, V by 2^-23; a cap's slope is at most 1."""
    q, k, v = extra_states()
    found = attend(q, k, v, is_causal=True, kv="int24", numerics="exact8", **EXTRAS[name])
    exact = in_fp64(q, k, v, **EXTRAS[name])
    size = (q.double().norm(dim=-1).amax() * k.double().norm(dim=-1).amax()).item() / 4
    bound = (4 * (2 * size + 1) * 2.0**-23 + 2.0**-23) * v.abs().amax().item()
    error = (found.double() - exact).abs().amax().item()
    print(f"{name}: error {error:.1e}, observed/bound {error / bound:.3f}")
    assert error <= bound


@pytest.mark.parametrize("name", EXTRAS)
def test_prefill_is_decode_with_windows_caps_and_sinks(name):
    """Each query alone against the keys up to it, with padding in front, by a mask."""
    q, k, v = extra_states()
    options, window = EXTRAS[name], EXTRAS[name]["window"]
    whole = attend(q, k, v, is_causal=True, **options)
    for row in (0, 3, 10):
        keys = torch.arange(11)
        mask = (keys <= row) & (keys > row - (window or 99))
        padded = [torch.nn.functional.pad(x, (0, 0, 3, 0), value=7.0) for x in (k, v)]
        one = attend(
            q[:, :, row : row + 1], *padded,
            mask=torch.nn.functional.pad(mask, (3, 0))[None], **(options | {"window": None}),
        )  # fmt: skip
        assert differing(one, whole[:, :, row : row + 1]) == 0


@pytest.mark.parametrize("name", EXTRAS)
def test_who_adds_does_not_show_with_windows_caps_and_sinks(name):
    q, k, v = extra_states()
    first = attend(q, k, v, is_causal=True, **EXTRAS[name])
    options = EXTRAS[name] | {"numerics": "exact5:a100:2"}
    assert differing(attend(q, k, v, is_causal=True, **options), first) == 0


def test_a_row_that_sees_nothing_is_zero_with_a_cap():
    q, k, v = extra_states()
    mask = torch.zeros(11, 11, dtype=torch.bool)
    assert (attend(q, k, v, mask, softcap=2.0) == 0).all()


def test_gradients_with_caps_and_sinks_are_those_of_fp64():
    q, k, v = extra_states()
    sinks = EXTRAS["sinks"]["sinks"]
    ours = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    wide = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    options = {"window": 6, "softcap": 4.0}
    attend(*ours[:3], is_causal=True, kv="int24", numerics="exact8", sinks=ours[3],
           **options).square().sum().backward()  # fmt: skip
    in_fp64(*wide[:3], sinks=wide[3], **options).square().sum().backward()
    for found, exact in zip(ours, wide, strict=True):
        error = (found.grad.double() - exact.grad).norm() / exact.grad.norm()
        print(f"relative error {error:.1e}, observed/bound {error / 2.0**-16:.3f}")
        assert error <= 2.0**-16
