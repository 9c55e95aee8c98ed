"""The C++ that Inductor makes of `heal::` operators: within the bound, and thrifty with
weights."""

from __future__ import annotations

import logging
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import compile_fx, metrics
from torch._inductor.utils import fresh_cache, run_and_get_code

from tests.support.rewriting import to, worst_ratio

U = 2.0**-24
BF16 = torch.bfloat16
FP32_OUT = {"outputs": "fp32", "kv": "fp32"}


def source_of(function, *args) -> tuple[object, str]:
    """The result of the compiled function and its generated code."""
    compiled = torch.compile(function, backend="heal", options=FP32_OUT)
    with torch.no_grad():
        result, sources = run_and_get_code(compiled, *args)
    return result, "\n".join(sources)


def buffers(source: str) -> list[int]:
    """Sizes, in elements, of the FP32 buffers that the code allocates."""
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\).*?torch\.float32\)", source)
    return [math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes]


def gemms(source: str) -> list[str]:
    """The calls of a library's matrix product."""
    return re.findall(r"extern_kernels\.\w*mm\w*\(", source)


class Decoder(nn.Module):
    """A gated feed-forward block, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(72, 200, bias=False, dtype=BF16)
        self.up = nn.Linear(72, 200, bias=False, dtype=BF16)
        self.down = nn.Linear(200, 72, dtype=BF16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def turned() -> Decoder:
    """One whose weights lie in memory the other way: no kernel of ours reads them."""
    model = Decoder()
    for layer in model.children():
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return model


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_products_read_16_bit_weights_and_never_stores_them_in_fp32(rows):
    torch.manual_seed(0)
    model, x = Decoder(), torch.randn(rows, 72).to(BF16)
    result, source = source_of(model, x)
    assert not gemms(source), "a GEMM would need the weight in FP32"
    assert max(buffers(source)) < 72 * 200, "a whole weight was copied"
    with torch.no_grad():
        exact = Decoder().double()
        exact.load_state_dict(model.state_dict())
        single = Decoder()
        single.load_state_dict(model.state_dict())
        truth = exact(x.double())
        theirs = (single.float()(x.float()).double() - truth).norm()
    assert (result.double() - truth).norm() <= 2 * theirs + U * truth.norm()


def test_the_counter_sees_a_weight_that_is_copied():
    """The inverse: a library's GEMM, whose operand has to be FP32 in memory."""
    _, source = source_of(turned(), torch.randn(64, 72).to(BF16))
    assert len(gemms(source)) == 3
    assert max(buffers(source)) >= 72 * 200


@pytest.fixture
def traffic(monkeypatch):
    """Bytes that the loops of one call read and write, by Inductor's count, and kernels called."""
    # Inductor counts for a log that takes INFO, and for nobody else.
    log = logging.Logger("bytes", logging.INFO)
    monkeypatch.setattr(compile_fx, "inductor_metrics_log", log)

    def count(model: Decoder, rows: int) -> tuple[int, int]:
        metrics.reset()
        with fresh_cache():  # what is cached is not counted
            _, source = source_of(model, torch.randn(rows, 72).to(BF16))
        kernels = re.findall(r"^ +cpp_fused\w*\(", source, re.MULTILINE)
        return metrics.num_bytes_accessed, len(kernels)

    return count


def test_decode_reads_each_weight_once_in_its_16_bits(traffic):
    """And runs one kernel per layer at most: what lies between layers is fused into them."""
    found, kernels = traffic(Decoder(), 1)
    weights = sum(weight.nbytes for weight in Decoder().parameters())
    activations = 4 * (2 * 72 + 3 * 200 + 2 * 72)  # FP32: in, gate, up, their product, sum, out
    print(f"{found} bytes of {weights} + {2 * activations}, {kernels} kernels")
    assert weights <= found <= weights + 2 * activations
    assert kernels <= 3


def test_the_count_of_bytes_sees_a_weight_that_is_copied(traffic):
    """The inverse: a GEMM reads FP32, which is written from 16 bits before."""
    weights = sum(weight.nbytes for weight in Decoder().parameters())
    assert traffic(turned(), 64)[0] >= (1 + 2 + 2) * weights


def weight(rows: int, columns: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """A matrix `[rows, columns]`: rows after rows, columns after columns, or every other
    element."""
    generator = torch.Generator().manual_seed(rows + columns)
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    if layout == "strided":
        return torch.randn(rows, 2 * columns, generator=generator).to(dtype)[:, ::2]
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_lowered_products_are_within_k_u(dtype):
    """Rows on both sides of the border of decode, odd sizes, K = 1, every layout: one compile."""
    cases = [
        (m, k, n, layout)
        for m, k, n in ((1, 37, 19), (3, 1, 5), (8, 64, 33), (9, 65, 31), (1, 5, 1))
        for layout in ("contiguous", "transposed", "strided")
    ]
    left = [torch.randn(m, k).to(dtype) for m, k, _, _ in cases]
    right = [weight(k, n, layout, dtype) for _, k, n, layout in cases]

    def products(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
        return [a @ b for a, b in zip(left, right, strict=True)]

    found = torch.compile(products, backend="heal", options=FP32_OUT)(left, right)
    for (_, k, _, _), a, b, result in zip(cases, left, right, found, strict=True):
        exact = a.double() @ b.double()
        budget = k * U * (a.double().abs() @ b.double().abs()) * (1 + k * U)
        assert result.dtype == torch.float32
        assert worst_ratio(result, exact, budget) <= 1


def test_special_values_and_empty_operands_go_through_the_lowering():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([[1.0, inf, 0.0], [nan, 1.0, 2.0], [0.0, -0.0, 1e-40]]).to(BF16)
    b = torch.tensor([[1.0, 0.0], [1.0, -1.0], [3e38, 1e-40]]).to(BF16)

    def products(a, b):
        return a @ b, a[:1] @ b, a[:0] @ b, a[:, :0] @ b[:0], a @ b[:, :0]

    found = torch.compile(products, backend="heal", options=FP32_OUT)(a, b)
    for result, expected in zip(found, products(a.float(), b.float()), strict=True):
        assert result.shape == expected.shape
        assert torch.equal(result.isnan(), expected.isnan())
        same = expected.isnan() | (result == expected)
        tiny = (result - expected).abs() <= 3 * U * expected.abs() + 2.0**-126
        assert (same | tiny).all()


#: name -> (query heads, key heads, L, S, mask)
ATTENTION = {
    "decode with grouped heads": (6, 2, 1, 19, "bool"),
    "decode, per-head float mask": (4, 4, 1, 7, "heads"),
    "causal with grouped heads": (4, 2, 9, 9, "causal"),
    "causal, one query": (4, 2, 1, 5, "causal"),
    "prefill, float mask": (2, 2, 5, 8, "float"),
    "no mask": (2, 1, 3, 4, "none"),
    "a row without a visible key": (2, 2, 3, 4, "empty row"),
}


def attention_case(name: str):
    heads, key_heads, length, keys, mask = ATTENTION[name]
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, heads, length, 16, generator=generator).to(BF16)
    key = torch.randn(2, key_heads, keys, 16, generator=generator).to(BF16)
    value = torch.randn(2, key_heads, keys, 16, generator=generator).to(BF16)
    options: dict[str, object] = {"enable_gqa": heads != key_heads}
    if mask == "causal":
        options["is_causal"] = True
    elif mask in ("bool", "empty row"):
        visible = torch.rand(2, 1, length, keys, generator=generator) < 0.6
        visible[..., 0] = True
        visible[0, 0, -1] = mask != "empty row" and visible[0, 0, -1]
        options["attn_mask"] = visible
    elif mask != "none":
        lead = (1, heads) if mask == "heads" else ()
        options["attn_mask"] = torch.randn(*lead, length, keys, generator=generator).to(BF16)
    return (query, key, value), options


def test_lowered_attention_is_as_good_as_torchs_fp32():
    """All cases in one compile: decode folds query heads, prefill repeats key heads."""
    cases = {name: attention_case(name) for name in ATTENTION}

    def attend(cases):
        sdpa = F.scaled_dot_product_attention
        return {name: sdpa(*states, **options) for name, (states, options) in cases.items()}

    found = torch.compile(attend, backend="heal", options=FP32_OUT)(cases)
    exact = attend(to(cases, torch.float64))
    single = attend(to(cases, torch.float32))
    for name, result in found.items():
        assert result.dtype == torch.float32, name
        assert not result.isnan().any(), name
        ours = (result.double() - exact[name]).norm()
        theirs = (single[name].double() - exact[name]).norm()
        print(f"{name}: {float(ours / theirs.clamp_min(1e-30)):.2f} of FP32's error")
        assert ours <= 2 * theirs + 4 * U * exact[name].norm(), name  # see `against_torch`
    empty = found["a row without a visible key"][0, :, -1]
    assert (empty == 0).all()


def test_the_operator_obeys_a_mask_and_causality_at_once():
    """`heal::sdpa` refuses both, as torch does; the operator below it has a meaning for both."""
    (query, key, value), _ = attention_case("causal with grouped heads")
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    mask.fill_diagonal_(True)

    def attend(*states: torch.Tensor) -> torch.Tensor:
        rest = (None, None, True, 0.25, None, None, 0.0, "heal")
        return torch.ops.heal.attention(*states, mask, *rest)[0]

    found, eager = source_of(attend, query, key, value)[0], attend(query, key, value)
    options = {"attn_mask": mask.tril(), "scale": 0.25, "enable_gqa": True}
    exact, budget = exact_and_budget(query, key, value, **options)
    for result in (found, eager):
        assert worst_ratio(result, exact, budget) <= 1


def exact_and_budget(query, key, value, **options):
    """SDPA in FP64, and what FP32 may be off by: E + 8 and S + 4 roundings of scores and sums."""
    query, key, value = (x.double() for x in (query, key, value))
    exact = F.scaled_dot_product_attention(query, key, value, **options)
    size = F.scaled_dot_product_attention(query, key, value.abs(), **options)
    length = query.norm(dim=-1).amax() * key.norm(dim=-1).amax()
    scores = (query.shape[-1] + 8) * length * options.get("scale", query.shape[-1] ** -0.5)
    return exact, (2 * scores + key.shape[-2] + 4) * U * size


@pytest.mark.parametrize(("rows", "kernel"), [(3, True), (1, False)])
def test_head_sizes_may_differ_and_a_single_row_runs_the_reference(rows, kernel):
    query, key, value = (torch.randn(1, 1, rows, e).to(BF16) for e in (8, 8, 5))
    found, source = source_of(F.scaled_dot_product_attention, query, key, value)
    assert ("product_tile" in source) == kernel
    assert ("heal.attention" in source) != kernel
    assert worst_ratio(found, *exact_and_budget(query, key, value)) <= 1
