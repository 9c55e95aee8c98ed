"""Integer attention: the same bits for every tiling, padding and generation; within bounds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from exactly import differing

import healpass.ops  # noqa: F401
from healpass.arithmetic.int16 import round_trip
from healpass.ops import exact_attention as ea

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
    return heal.exact_sdpa(q, k, v, mask, enable_gqa=True, **options)


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
    q, k, v = (round_trip(x, ea.FORMATS[kv]).double() for x in (q, k, v))
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
    scale = ea.planes(v, "int16")[1].double().repeat_interleave(2, 1)[:, :, None]
    scale[..., 4] *= 2.0**12
    visible = (torch.arange(9) != 4).expand_as(scale)
    weights = torch.full_like(scale, 0.123)
    kept, exponent = ea._fixed_point(weights, scale, visible)
    wrong, other = ea._fixed_point(weights, scale, torch.ones_like(visible))
    values = [
        (p.double() * 2.0 ** e.double())[visible]
        for p, e in ((kept, exponent - ea.P_BITS), (wrong, other - ea.P_BITS))
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
    with pytest.raises(ValueError, match="may overflow INT64"):
        heal.exact_attention(digits, one, many, scales, many, scales, None, False, 1.0, "exact5")


@pytest.mark.parametrize("kv", ["int16", "int24"])
def test_gradients_are_exact_and_have_the_same_bits_everywhere(kv):
    q, k, v = states(6, 6)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))

    def gradients(numerics):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        result = attend(*inputs, is_causal=True, kv=kv, numerics=numerics)
        return torch.autograd.grad(result, inputs, upstream)

    first = gradients("exact8")
    for rule in GENERATIONS:
        assert differing(gradients(f"exact8:{rule}:2"), first) == 0
    inputs = [round_trip(x, ea.FORMATS[kv]).double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(
        F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True),
        inputs,
        upstream.double(),
    )
    for ours, truth in zip(first, exact, strict=True):
        # Three chained products of 8 digit pairs: 2^-20 of the norm each on such data.
        assert (ours.double() - truth).norm() <= 3 * 2.0**-20 * truth.norm()


def test_what_has_no_meaning_is_refused():
    q, k, v = states()
    mask = torch.ones(9, 9, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="exclude each other"):
        attend(q, k, v, mask, is_causal=True)
    with pytest.raises(RuntimeError, match="draws random numbers"):
        attend(q, k, v, dropout_p=0.1)
    added = torch.zeros(9, 9, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient for attn_mask"):
        attend(q, k, v, added).sum().backward()
    with pytest.raises(TypeError, match=r"got a torch\.float64 operand"):
        torch.ops.heal.silu(q.double())


def test_opcheck_is_green():
    q, k, v = (x.requires_grad_() for x in states())
    planes = [part for x in (q, k, v) for part in ea.planes(x.detach(), "int16")]
    torch.library.opcheck(heal.exact_attention.default, (*planes, None, True, 0.25, "exact5"))
    torch.library.opcheck(
        heal.exact_attend.default, (q, k, v, None, True, 0.25, "int16", "exact5")
    )
