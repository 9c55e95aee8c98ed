"""heal::integer_attention and heal::sdpa(kv=...): corners, dropout, gradients."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from healpass.ops.attention import blockwise, floats
from healpass.ops.attention import integers as integer_attention
from healpass.ops.attention.quantize import integers
from healpass.ops.attention.scoring import dropout_words

heal = torch.ops.heal
KV = ("int16", "int24")


def operands(kv="int16", length=5, keys=7, size=8, value_size=6):
    torch.manual_seed(0)
    query = torch.randn(2, 4, length, size)
    key, value = torch.randn(2, 2, keys, size), torch.randn(2, 2, keys, value_size)
    return [part for x in (query, key, value) for part in heal.quantize(x, kv)]


def attend(digits, mask=None, sinks=None, seed=None, causal=False, window=None, softcap=None,
           dropout_p=0.0, numerics="heal"):  # fmt: skip
    return heal.integer_attention(
        *digits, mask, sinks, seed, causal, 0.25, window, softcap, dropout_p, numerics
    )


def calls():
    digits, seed = operands(), torch.tensor([2**40 + 3])
    mask, sinks = torch.randn(5, 7), torch.randn(4)
    call = (*digits, mask, sinks, seed, False, 0.25, 3, 2.0, 0.25, "heal")
    output, logsumexp = heal.integer_attention(*call)
    grad = torch.randn_like(output)
    query, key = torch.randn(2, 4, 3, 8, requires_grad=True), torch.randn(2, 2, 5, 8)
    yield "quantize", (query.detach(), "int24"), {}
    yield "dequantize", digits[:2], {}
    yield "stored", (key,), {}
    yield "integer_attention", call, {}
    yield "integer_attention_backward", (grad, *call, output, logsumexp), {}
    yield "integer_attention_mask_grad", (grad, *call, output, logsumexp), {}
    yield "sdpa", (query, key, key), {"enable_gqa": True, "kv": "int16", "is_causal": True}


@pytest.mark.parametrize("call", list(calls()), ids=lambda call: call[0])
def test_opcheck_is_green(call):
    name, args, kwargs = call
    results = torch.library.opcheck(getattr(heal, name).default, tuple(args), kwargs)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kv", KV)
def test_digits_are_those_of_the_integers(kv):
    x = torch.randn(3, 4, 5)
    digits, scale = heal.quantize(x, kv)
    assert digits.shape == (3, 2 if kv == "int16" else 3, 4, 5)
    nearest = (x.double() / scale.double().unsqueeze(-1)).round()
    assert torch.equal(integers(digits), nearest)


def test_scores_are_exact_and_do_not_depend_on_the_order_of_the_head():
    """Permuting the head's elements permutes no bit of the result."""
    digits = operands(size=64, length=130)
    order = torch.randperm(64)
    permuted = [x[..., order] if i in (0, 2) else x for i, x in enumerate(digits)]
    for ours, theirs in zip(attend(digits), attend(permuted), strict=True):
        assert torch.equal(ours, theirs)


def test_a_row_that_sees_nothing_is_zero():
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[1] = False
    output, logsumexp = attend(operands(), mask)
    assert (output[:, :, 1] == 0).all()
    assert (logsumexp[:, :, 1] == -math.inf).all()
    assert (output[:, :, 0] != 0).all()
    additive = torch.where(mask, 0.0, -math.inf)
    assert torch.equal(attend(operands(), additive)[0], output)


@pytest.mark.parametrize(("keys", "length"), [(0, 3), (3, 0), (1, 1)])
def test_no_keys_no_queries_one_of_each(keys, length):
    output, logsumexp = attend(operands(keys=keys, length=length), causal=True, window=2)
    assert output.shape == (2, 4, length, 6)
    assert logsumexp.shape == (2, 4, length)
    assert not output.isnan().any()
    assert keys or (output == 0).all()


def test_nan_is_where_the_inputs_have_it_and_a_hidden_key_has_no_effect():
    query, key, value = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    clean = heal.sdpa(query, key, value, is_causal=True, kv="int16")
    key[0, 0, 2], value[0, 0, 3] = math.nan, math.inf
    found = heal.sdpa(query, key, value, is_causal=True, kv="int16")
    assert torch.equal(found[0, 0, :2], clean[0, 0, :2])
    assert found[0, 0, 2:].isnan().all()


@pytest.mark.parametrize("magnitude", [2.0**-140, 2.0**-126, 1e-30, 1e30, 2.0**127])
@pytest.mark.parametrize("numerics", ["heal", "heal:v100"])
def test_huge_and_tiny_magnitudes_stay_finite(magnitude, numerics):
    torch.manual_seed(0)
    query, key, value = (magnitude * torch.randn(1, 2, 5, 8).clamp(-1, 1) for _ in range(3))
    output = heal.sdpa(query, key, value, kv="int24", numerics=numerics)
    assert output.isfinite().all()
    assert (output.abs() <= value.abs().amax(2, keepdim=True) * (1 + 2**-20) + 2.0**-127).all()


def test_blocks_of_queries_change_nothing(monkeypatch):
    digits = operands(length=150, keys=150)
    expected = attend(digits, causal=True, window=40)
    monkeypatch.setattr(blockwise, "ROWS", 7)
    for ours, theirs in zip(attend(digits, causal=True, window=40), expected, strict=True):
        assert (ours - theirs).abs().max() <= 2**-20


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *made, 0)
        return result


@pytest.mark.parametrize("kv", [*KV, "fp32"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_linearly_with_the_length(backward, kv):
    """Twice the length is twice the largest tensor; the inverse, one block of all, has its square.

    The operator's function is called itself: inside the operator a mode sees nothing.
    """
    sizes = [largest_tensor(kv, length, backward) for length in (512, 1024)]
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[1] < 8 * 1024 * 1024 / 4


def test_the_check_of_memory_notices_a_score_matrix(monkeypatch):
    monkeypatch.setattr(blockwise, "ROWS", 1024)
    for kv in ("int16", "fp32"):
        assert largest_tensor(kv, 1024, backward=False) >= 8 * 1024 * 1024


def largest_tensor(kv: str, length: int, backward: bool) -> int:
    operators = (floats if kv == "fp32" else integer_attention).OPERATORS
    states = operands("int16" if kv == "fp32" else kv, length=length, keys=length)
    if kv == "fp32":
        states = [heal.dequantize(*states[i : i + 2]) for i in (0, 2, 4)]
    sinks, seed = torch.randn(4), torch.tensor([1])
    call = (*states, None, sinks, seed, True, 0.25, None, 2.0, 0.5, "heal")
    with LargestTensor() as forward:
        output, logsumexp = operators.attend._init_fn(*call)
    with LargestTensor() as mode:
        operators.backward._init_fn(output, *call, output, logsumexp)
    return (mode if backward else forward).elements


def test_compiled_prefill_stores_no_score_matrix():
    query = torch.randn(1, 2, 1100, 16)
    compiled = torch.compile(
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        backend="heal",
    )
    with torch.no_grad():
        found, sources = run_and_get_code(compiled, query)
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", "".join(sources))
    largest = max(math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes)
    assert largest < 1100 * 1100
    eager = heal.sdpa(query, query, query, is_causal=True, kv="int16")
    assert (found - eager).abs().max() <= 2.0**-18 * eager.abs().max()


# -------------------------------------------------------------------------------------- dropout


def test_dropout_replays_from_its_seed_and_drops_its_share():
    digits, seed = operands(length=150, keys=200), torch.tensor([99])
    first = attend(digits, seed=seed, dropout_p=0.25)[0]
    assert torch.equal(first, attend(digits, seed=seed, dropout_p=0.25)[0])
    assert not torch.equal(first, attend(digits, seed=seed + 1, dropout_p=0.25)[0])
    words = dropout_words(seed, (2, 4), slice(0, 150), slice(0, 200))
    count, dropped = words.numel(), int((words < 2**30).sum())
    assert abs(dropped - count / 4) < 5 * (count * 3 / 16) ** 0.5
    lag = [((words < 2**31) ^ (words.roll(1, dim) < 2**31)).float().mean() for dim in range(4)]
    assert all(abs(float(share) - 0.5) < 5 * 0.5 / count**0.5 for share in lag)


def test_any_tile_replays_the_same_words():
    seed = torch.tensor([-(2**50)])
    whole = dropout_words(seed, (2, 3), slice(0, 20), slice(0, 30))
    tile = dropout_words(seed, (2, 3), slice(5, 9), slice(11, 30))
    assert torch.equal(whole[:, :, 5:9, 11:30], tile)
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 2**32


def test_the_words_are_those_of_the_formula():
    """In Python's own integers, as a kernel would compute them in 32 bits."""

    def mix(word):
        word = (word + 0x9E3779B9) & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            word = ((word ^ (word >> shift)) * factor) & 0xFFFFFFFF
        return word ^ (word >> 16)

    seed = 0x123456789ABCDEF
    words = dropout_words(torch.tensor(seed), (1, 2), slice(3, 5), slice(6, 8))
    for head, query, key in itertools.product((0, 1), (3, 4), (6, 7)):
        row = mix(mix(seed & 0xFFFFFFFF) ^ (seed >> 32))
        for index in (0, head, query):
            row = mix(row ^ index)
        assert int(words[0, head, query - 3, key - 6]) == mix(row ^ mix(key))


def test_dropout_needs_a_seed_and_sdpa_draws_one():
    with pytest.raises(RuntimeError, match="needs a seed"):
        attend(operands(), dropout_p=0.5)
    query = torch.randn(1, 2, 20, 8)
    torch.manual_seed(4)
    first = heal.sdpa(query, query, query, dropout_p=0.5, kv="int16")
    torch.manual_seed(4)
    assert torch.equal(first, heal.sdpa(query, query, query, dropout_p=0.5, kv="int16"))


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kv", KV)
def test_gradients_of_everything_agree_with_fp64(kv):
    """Within a few steps of the format; the derived bound is a property test."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 11, 8)
    value, mask, sinks = torch.randn(2, 2, 11, 6), torch.randn(1, 4, 9, 1), torch.randn(4)
    leaves = [x.requires_grad_() for x in (query, key, value, mask, sinks)]
    grad, seed = torch.randn(2, 4, 9, 6), torch.tensor([5])
    found = gradients(leaves, grad, kv=kv, seed=seed)
    exact = gradients([x.detach().double().requires_grad_() for x in leaves], grad, seed=seed)
    step = 2.0**-12 if kv == "int16" else 2.0**-19
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.shape == wanted.shape
        assert (ours - wanted).norm() <= step * wanted.norm()


def gradients(leaves: list[Tensor], grad: Tensor, seed: Tensor, kv: str | None = None):
    query, key, value, mask, sinks = leaves
    if kv is not None:
        result = heal.sdpa(
            query, key, value, mask, 0.25, enable_gqa=True, scale=0.4, softcap=3.0,
            sinks=sinks, seed=seed, kv=kv,
        )  # fmt: skip
        return torch.autograd.grad(result, leaves, grad)
    scores = 0.4 * query @ key.repeat_interleave(2, 1).mT
    scores = 3.0 * torch.tanh(scores / 3.0) + mask
    logits = torch.cat([sinks[:, None, None].expand(2, 4, 9, 1), scores], -1)
    words = dropout_words(seed, scores.shape, slice(0, 9), slice(0, 11))
    weights = torch.softmax(logits, -1)[..., 1:] * (words >= 2**30) / 0.75
    return torch.autograd.grad(weights @ value.repeat_interleave(2, 1), leaves, grad.double())


def test_gradients_come_in_the_dtypes_of_their_operands():
    leaves = [
        torch.randn(1, 2, 3, 4, dtype=dtype, requires_grad=True)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    heal.sdpa(*leaves, kv="int16").sum().backward()
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]


def test_a_second_derivative_is_refused_and_not_wrong():
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    result = heal.sdpa(query, query, query, kv="int16").pow(3).sum()
    (grad,) = torch.autograd.grad(result, query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiled_training_and_checkpointing_agree_with_eager():
    torch.manual_seed(0)
    query = torch.randn(1, 2, 9, 8, requires_grad=True)

    def loss(x):
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x.pow(2).sum()

    (found,) = torch.autograd.grad(
        torch.compile(loss, backend="heal", options={"kv": "int24"})(query), query
    )
    (exact,) = torch.autograd.grad(loss(query.double()), query)
    (single,) = torch.autograd.grad(loss(query), query)
    theirs = (single - exact).norm() + 2.0**-22 * exact.norm()
    assert (found - exact).norm() <= 4 * theirs


def test_compiled_dropout_drops_the_same_weights_forward_and_backward():
    """The output is linear in V: <dV, V> is <G, O> if, and only if, both drop the same."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 9, 8)
    value = torch.randn(1, 2, 9, 8, requires_grad=True)

    def function(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5)

    options = {"kv": "int24", "outputs": "fp32"}
    output = torch.compile(function, backend="heal", options=options)(query, key, value)
    grad = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, value, grad)
    size = (found * value).abs().sum()
    assert (output == 0).sum() < output.numel()
    assert ((found * value).sum() - (grad * output).sum()).abs() <= 2.0**-18 * size


def test_wrong_operands_are_refused_by_name():
    digits = operands()
    with pytest.raises(RuntimeError, match="INT8 key digits"):
        attend([*digits[:2], digits[2].float(), *digits[3:]])
    with pytest.raises(ValueError, match="kv='int8'"):
        heal.quantize(torch.randn(2, 3), "int8")
    with pytest.raises(TypeError, match="float64"):
        heal.quantize(torch.randn(2, 3).double(), "int16")
