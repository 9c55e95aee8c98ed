"""Attention reads a HealCache's digits through repeated heads, slices and views."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import run_and_get_code

import healpass
from healpass.config import HealConfig
from healpass.graph.nodes import heal_name
from tests.support.bits import differing
from tests.support.rewriting import Rewritten

heal = torch.ops.heal
BF16 = torch.bfloat16
DEFAULT = HealConfig(outputs="fp32")
B, H, HKV, L, S, E = 2, 6, 2, 1, 40, 16


def states(kv="int16", length=L):
    """A BF16 query, and the digits and scales of keys and values in a cache."""
    torch.manual_seed(0)
    query = torch.randn(B, H, length, E).to(BF16)
    key, value = (heal.quantize(torch.randn(B, HKV, S, E), kv) for _ in range(2))
    return query, *key, *value


def repeated(x, groups=H // HKV):
    """As transformers' repeat_kv."""
    batch, heads, length, size = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, groups, length, size)
    return x.reshape(batch, heads * groups, length, size)


def attend(query, kd, ks, vd, vs, between=lambda x: x, **arguments):
    key, value = (between(heal.dequantize(*x).to(query.dtype)) for x in ((kd, ks), (vd, vs)))
    return F.scaled_dot_product_attention(query, key, value, **arguments)


def operators(compiled: Rewritten) -> list[str]:
    """The `heal::` operators whose results are used."""
    (graph_module,) = compiled.graphs
    graph_module.graph.eliminate_dead_code()
    return [name for node in graph_module.graph.nodes if (name := heal_name(node))]


FOLDED = {
    "grouped": lambda *x: attend(*x, enable_gqa=True),
    "repeat_kv": lambda *x: attend(*x, repeated),
    "unsqueeze": lambda *x: attend(
        *x, lambda k: k.unsqueeze(2).expand(B, HKV, 3, S, E).flatten(1, 2)
    ),
    "masked": lambda *x: attend(*x, repeated, attn_mask=torch.arange(S)[None] < 30),
    "cut": lambda *x: attend(*x, lambda k: repeated(k)[:, :, :7, :]),
    "scaled": lambda *x: attend(*x, enable_gqa=True, scale=0.3),
    "contiguous": lambda *x: attend(*x, lambda k: repeated(k).contiguous()),
}  # fmt: skip


@pytest.mark.parametrize("kv", ["int16", "int24"])
@pytest.mark.parametrize("name", FOLDED)
def test_the_dequantization_is_folded_into_attention(name, kv):
    operands = states(kv)
    compiled = Rewritten(FOLDED[name], DEFAULT)
    with torch.no_grad():
        found = compiled(*operands)
    assert operators(compiled) == ["heal::quantize", "heal::integer_attention"]
    plain = FOLDED[name](operands[0].float(), *operands[1:])
    bound = 2**-13 if kv == "int16" else 2**-20  # a few steps of the query's quantization
    assert (found - plain).abs().max() <= bound * plain.abs().max()


OTHERS = {
    "a product": lambda *x: attend(*x, lambda k: k * 2, enable_gqa=True),
    "another order of heads": lambda *x: attend(*x, lambda k: k.repeat(1, 3, 1, 1)),
    "tiled heads": lambda *x: attend(
        *x, lambda k: k[:, None].expand(B, 3, HKV, S, E).reshape(B, H, S, E)
    ),
    "another order of keys": lambda *x: attend(*x, lambda k: k.flip(2), enable_gqa=True),
    "a step": lambda *x: attend(*x, lambda k: k[:, :, ::2], enable_gqa=True),
    "a reshape across heads": lambda *x: attend(
        *x, lambda k: k.reshape(B, S, HKV, E).transpose(1, 2), enable_gqa=True
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_mere_move_is_not_folded(name):
    """The inverse: the result is right because the values are dequantized first."""
    operands = states()
    compiled = Rewritten(OTHERS[name], DEFAULT)
    with torch.no_grad():
        found = compiled(*operands)
    assert "heal::integer_attention" not in operators(compiled)
    plain = OTHERS[name](operands[0].float(), *operands[1:])
    assert (found - plain).abs().max() <= 2**-12 * plain.abs().max()


def test_a_gradient_keeps_the_dequantized_values():
    query, *cache = states()
    query = query.float().requires_grad_()
    compiled = Rewritten(FOLDED["grouped"], DEFAULT)
    compiled(query, *cache).sum().backward()
    assert "heal::sdpa" in operators(compiled)
    found, query.grad = query.grad, None
    FOLDED["grouped"](query, *cache).sum().backward()
    assert (found - query.grad).abs().max() <= 2**-12 * query.grad.abs().max()


def test_the_caches_format_wins_over_the_default_and_an_explicit_other_one_raises():
    operands = states("int24")
    compiled = Rewritten(FOLDED["grouped"], DEFAULT)
    with torch.no_grad():
        compiled(*operands)
        quantize = next(
            n for n in compiled.graphs[0].graph.nodes if heal_name(n) == "heal::quantize"
        )
        assert quantize.args[1] == "int24"
        with pytest.raises(BackendCompilerFailed, match=r"HealCache.* keeps int24"):
            Rewritten(FOLDED["grouped"], HealConfig(kv="int16"))(*operands)


def test_an_fp32_cache_keeps_attention_in_fp32():
    def function(query, key, value):
        key, value = (heal.stored(x).to(query.dtype) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value)

    query, key = torch.randn(1, 2, 3, 8).to(BF16), torch.randn(1, 2, 5, 8)
    compiled = Rewritten(function, DEFAULT)
    with torch.no_grad():
        compiled(query, key, key)
    (node,) = [n for n in compiled.graphs[0].graph.nodes if heal_name(n) == "heal::sdpa"]
    assert node.kwargs["kv"] == "fp32"


EXACT = HealConfig(precision="exact", outputs="fp32")


@pytest.mark.parametrize("kv", ["int16", "int24"])
@pytest.mark.parametrize("name", ["grouped", "masked", "cut"])
def test_exact_attention_reads_the_digits_too_with_the_bits_of_the_values(name, kv):
    operands = states(kv)
    whole = HealConfig(
        precision="exact", kv=kv, outputs="fp32", debug={"disable": ("cache_reads",)}
    )
    folded, apart = (Rewritten(FOLDED[name], config) for config in (EXACT, whole))
    with torch.no_grad():
        found, wanted = folded(*operands), apart(*operands)
    assert operators(folded)[:2] == ["heal::quantize", "heal::integer_attention"]
    assert "heal::sdpa" in operators(apart)
    assert differing(found, wanted) == 0


def test_one_graph_of_exact_attention_reads_digits_of_every_length():
    compiled = Rewritten(FOLDED["grouped"], EXACT, dynamic=True)
    for kv in ("int16", "int24"):
        torch._dynamo.reset()
        found = compiled(*states(kv))
        query, *cache = states(kv)
        key, value = heal.dequantize(*cache[:2]), heal.dequantize(*cache[2:])
        wanted = heal.sdpa(query, key, value, enable_gqa=True, kv=kv, numerics="exact5")
        assert differing(found, wanted) == 0


@pytest.mark.parametrize("size", [96, 112, 128])
def test_a_folded_read_has_torchs_scale(size):
    """For these heads `size**-0.5` is another number than `1 / sqrt(size)`."""
    query, cache = torch.randn(1, 2, 1, size), heal.quantize(torch.randn(1, 2, 5, size), "int16")
    compiled = Rewritten(lambda *x: attend(*x), EXACT)
    with torch.no_grad():
        compiled(query, *cache, *cache)
    (node,) = [
        n for n in compiled.graphs[0].graph.nodes if heal_name(n) == "heal::integer_attention"
    ]
    schema = [argument.name for argument in heal.integer_attention.default._schema.arguments]
    assert node.args[schema.index("scale")] == 1 / math.sqrt(size) != size**-0.5


def test_exact_attention_rounds_an_fp32_cache_and_caps_the_values():
    def fp32_cache(query, key, value):
        key, value = (heal.stored(x).to(query.dtype) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value)

    def capped(query, *cache):
        key, value = (heal.dequantize(*x).to(query.dtype) for x in (cache[:2], cache[2:]))
        return heal.sdpa(query, key, value, enable_gqa=True, softcap=3.0)

    query, key = torch.randn(1, 2, 3, 8).to(BF16), torch.randn(1, 2, 5, 8)
    for function, operands, kv in (
        (fp32_cache, (query, key, key), "int16"),
        (capped, states("int24"), "int24"),
    ):
        compiled = Rewritten(function, EXACT)
        with torch.no_grad():
            assert compiled(*operands).isfinite().all()
        (node,) = [n for n in compiled.graphs[0].graph.nodes if heal_name(n) == "heal::sdpa"]
        assert node.kwargs["kv"] == kv


@pytest.mark.parametrize("kv", ["int16", "fp32"])
def test_decode_makes_no_fp32_copy_of_the_cache(kv):
    """The inverse is kv="fp32" on dequantized values, which stand in memory."""
    operands = states()
    function = FOLDED["masked"]
    if kv == "fp32":
        operands = (*operands[:1], *(heal.dequantize(*operands[i : i + 2]) for i in (1, 3)))

        def function(query, key, value):
            key, value = (repeated(x.to(BF16)) for x in (key, value))
            return F.scaled_dot_product_attention(query, key, value, torch.arange(S)[None] < 30)

    compiled = torch.compile(function, backend="heal", options={"outputs": "fp32", "kv": kv})
    with torch.no_grad():
        _, sources = run_and_get_code(compiled, *operands)
    copies = [f"({B}, {heads}, {extra}{S}, {E})" for heads in (H, HKV) for extra in ("", "3, ")]
    copied = any(f"empty_strided_cpu({shape}" in "".join(sources) for shape in copies)
    assert copied == (kv == "fp32")


def test_the_report_names_the_bound():
    with torch.no_grad():
        report = healpass.explain(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))(
            torch.randn(1, 4, 16)
        )
    (node,) = [node for node in report.nodes if node.heal_op == "heal::sdpa"]
    assert "2^-15.9 max|v|" in node.bound
