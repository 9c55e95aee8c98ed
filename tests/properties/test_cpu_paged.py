"""The C++ kernels over pages against the reference implementation of the operators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import healpass.lowering as lowering
from healpass.arithmetic import int16
from healpass.arithmetic.formats import FP32
from healpass.backend import PINNED_SETTINGS
from healpass.lowering.cpu import paged as kernels
from healpass.ops.attention import paged
from healpass.ops.attention.paged import Cell, PagedAttention
from healpass.ops.attention.quantize import FORMATS, Integers, integers
from healpass.ops.reproducible import fp64
from tests.support.bits import differing
from tests.support.profiles import examples

heal = torch.ops.heal
#: Query heads, key heads, E, Ev: groups, odd sizes, one whose integers need INT64 (3 digits).
SIZES = {
    "grouped": (9, 3, 64, 64),
    "odd": (4, 2, 17, 9),
    "single": (3, 3, 1, 1),
    "wide": (2, 1, 160, 8),
}
SCORINGS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 7},
    "all": {"is_causal": False},
    "capped": {"softcap": 3.0, "sinks": True, "window": 9},
    "gemma": {"softcap": 50.0},
    "hard": {"softcap": 1e-30},
    "soft": {"softcap": 3e38, "is_causal": False},
    "nothing": {"softcap": 1e-46, "window": 200},
    "sunk": {"sinks": True},
    "sunk window": {"sinks": True, "window": 5},
}
CALLS = [
    ("grouped", "int16", "causal"), ("grouped", "int16", "window"), ("odd", "int16", "all"),
    ("odd", "int24", "window"), ("single", "int16", "causal"), ("wide", "int24", "causal"),
]  # fmt: skip
#: Calls that go by weights in an exact precision; caps are written into kernels, so there are few.
WEIGHED = [
    ("grouped", "int16", "capped"), ("grouped", "int16", "gemma"), ("odd", "int24", "hard"),
    ("odd", "int16", "soft"), ("single", "int24", "nothing"), ("wide", "int24", "sunk"),
    ("odd", "int24", "sunk window"), ("single", "int16", "sunk"),
]  # fmt: skip


def drawn_states(size: tuple[int, ...], seed: int, spread: int) -> Tensor:
    """Tokens of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-spread, spread + 1, (*size[:2], 1), generator=generator)
    return torch.randn(size, generator=generator) * 2.0**exponents


def call_of(requests: list[tuple[int, int]], room: int, call: tuple[str, ...], **changes: Any):
    """The arguments of `heal::paged_attention`; pages lie in any order, the rest is poison.

    Args:
        requests: Tokens and queries of each.
        room: Tokens of a page.
        call: Of `CALLS`.
        **changes: `numerics`, `spread` of the exponents, `index` dtype, `lost` tokens, `sinks`.
    """
    (heads, key_heads, size, value_size), kv = SIZES[call[0]], call[1]
    how = {"is_causal": True, "window": None, "softcap": None, "sinks": None} | SCORINGS[call[2]]
    cell, spread = Cell(kv, size, value_size), changes.get("spread", 3)
    needed = [-(-tokens // room) for tokens, _ in requests]
    count = sum(needed) + 2
    pages = torch.full((count, key_heads, room, cell.nbytes), -1, dtype=torch.int8)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(room)).tolist()
    index = changes.get("index", torch.int32)
    blocks = torch.full((len(requests), max(needed, default=0) + 1), -1, dtype=index)
    slots = []
    for row, ((tokens, _), pages_needed) in enumerate(zip(requests, needed, strict=True)):
        own = [order.pop() for _ in range(pages_needed)]
        blocks[row, :pages_needed] = torch.tensor(own, dtype=index)
        slots += [own[place // room] * room + place % room for place in range(tokens)]
    key = drawn_states((len(slots), key_heads, size), 1, spread)
    value = drawn_states((len(slots), key_heads, value_size), 2, spread)
    for token in changes.get("lost", ()):
        key[token % len(slots), 0, 0] = math.inf
        value[(token + 5) % len(slots), -1, -1] = math.nan
    paged.write_tokens(pages, key, value, torch.tensor(slots), kv)
    starts = torch.tensor([0, *torch.tensor([q for _, q in requests]).cumsum(0)], dtype=index)
    query = drawn_states((int(starts[-1]) + 1, heads, size), 3, spread)
    given = changes.get("sinks", [-1.0, 0.5, 3.0])
    sinks = torch.tensor([given[h % len(given)] for h in range(heads)]) if how["sinks"] else None
    lengths = torch.tensor([tokens for tokens, _ in requests], dtype=index)
    return (
        query, pages, starts, lengths, blocks, sinks, how["is_causal"], size**-0.5,
        how["window"], how["softcap"], value_size, kv, changes.get("numerics", "exact5"),
    )  # fmt: skip


REQUESTS = st.lists(
    st.integers(1, 150).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    min_size=1, max_size=4,
)  # fmt: skip


@examples(40)
@given(
    requests=REQUESTS,
    room=st.sampled_from([1, 16, 32, 128]),
    call=st.sampled_from(CALLS),
    spread=st.sampled_from([0, 3, 30]),
    lost=st.lists(st.integers(0, 600), max_size=1),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_exact_attention_has_the_bits_of_the_reference(requests, room, call, spread, lost, index):
    """Ragged requests, decode and prefill, any page, any magnitude, NaN where it is seen."""
    arguments = call_of(requests, room, call, spread=spread, lost=lost, index=index)
    asked = PagedAttention.read(*arguments)
    found = kernels._attended(asked)
    assert found is not None
    assert differing(found, asked.attend()) == 0


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_what_integers_hold_is_not_rounded_when_it_is_rounded_again(fmt):
    """Every scale but for its power of two: the kernel leaves out what the reference does twice.

    A row's largest integer is the format's limit, or its scale is the smallest that there is.
    """
    largest = (torch.arange(1 << 23, dtype=torch.int32) | 0x3F800000).view(torch.float32)
    scale = (largest.double() / fmt.limit).float()
    assert ((largest.double() / scale.double()).round() == fmt.limit).all()
    assert torch.equal(((scale.double() * fmt.limit).float().double() / fmt.limit).float(), scale)
    for power in (-126, -110, 0, 127):  # the ends of FP32's range
        x = torch.randn(4096, 8) * 2.0**power
        once = int16.round_trip(x.clamp(-FP32.largest, FP32.largest), fmt)
        assert differing(int16.round_trip(once, fmt), once) == 0


SINKS = [0.0, -1.5, 4.0, 90.0, 3e38, -3e38, -math.inf, math.inf, math.nan]


@examples(60)
@given(
    requests=REQUESTS,
    room=st.integers(1, 128),
    call=st.sampled_from(WEIGHED),
    spread=st.sampled_from([0, 3, 30, 62]),
    lost=st.lists(st.integers(0, 600), max_size=1),
    sinks=st.lists(st.sampled_from(SINKS), min_size=1, max_size=4),
    numerics=st.sampled_from(["exact5", "exact8"]),
)
def test_exact_caps_and_sinks_have_the_bits_of_the_reference(
    requests, room, call, spread, lost, sinks, numerics
):
    """Caps from below FP32's numbers to its largest, scores past it, sinks that are no numbers."""
    changes = {"spread": spread, "lost": lost, "sinks": sinks, "numerics": numerics}
    asked = PagedAttention.read(*call_of(requests, room, call, **changes))
    assert kernels._takes(asked)
    found = kernels._attended(asked)
    assert found is not None
    assert differing(found, asked.attend()) == 0


@pytest.mark.parametrize("numerics", ["exact3", "exact6"])
@pytest.mark.parametrize("tokens", [129, 700])
def test_exact_caps_and_sinks_over_many_keys(tokens, numerics):
    for queries in (1, 2, tokens):
        call = call_of([(tokens, queries)], 16, WEIGHED[0], spread=8, numerics=numerics)
        asked = PagedAttention.read(*call)
        assert differing(kernels._attended(asked), asked.attend()) == 0


@pytest.mark.parametrize("tokens", [129, 1000])
def test_exact_attention_over_many_keys(tokens):
    """More than a block of keys, and rows in several tiles."""
    for queries in (1, 2, tokens):
        asked = PagedAttention.read(*call_of([(tokens, queries)], 16, CALLS[0], spread=8))
        assert differing(kernels._attended(asked), asked.attend()) == 0


def exact_truth(asked: PagedAttention) -> tuple[Tensor, Tensor, float]:
    """What the integers say, in FP64, the mean |v| under the weights, and the largest |score|."""
    largest = 0.0
    output = torch.zeros(*asked.query.shape[:2], asked.cell.value_size, dtype=torch.float64)
    size, scoring = output.clone(), asked.scoring
    group = asked.query.shape[1] // asked.pages.shape[1]
    for rows, key, value in asked._requests():
        query = Integers.of(asked.query[rows].transpose(0, 1)[None], asked.cell.kv)
        q, k, v = (
            integers(x.digits)[0] * x.scale[0].double()[..., None] for x in (query, key, value)
        )
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = (q @ k.mT * scoring.scale).clamp(-3.4e38, 3.4e38)
        largest = max(largest, float(scores.abs().max()))
        if scoring.softcap is not None:
            scores = (scores / scoring.softcap).tanh() * scoring.softcap
        seen = scoring.at(k.shape[1] - q.shape[1]).near(
            slice(0, q.shape[1]), slice(0, k.shape[1]), q.device
        )
        scores = scores if seen is None else scores.masked_fill(~seen, -math.inf)
        if scoring.sinks is not None:
            sinks = scoring.sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1).nan_to_num(0.0)
        output[rows] = (weights @ v).transpose(0, 1)
        size[rows] = (weights @ v.abs()).transpose(0, 1)
    return output, size, largest


@examples(25)
@given(
    requests=REQUESTS,
    room=st.sampled_from([1, 16, 128]),
    call=st.sampled_from(
        [*CALLS[:3], CALLS[5], ("grouped", "int16", "capped"), ("odd", "int24", "capped")]
    ),
    numerics=st.sampled_from(["heal", "layercast"]),
)
def test_other_precisions_add_one_rounding_to_what_the_integers_say(
    requests, room, call, numerics
):
    """Weights are FP64 within `fp64.ERROR`, numerator and denominator; then one rounding to FP32.

    A score of magnitude s, rounded four times in FP64, shifts a weight by s 2^-51.
    """
    asked = PagedAttention.read(*call_of(requests, room, call, numerics=numerics))
    found, (truth, size, largest) = kernels._attended(asked), exact_truth(asked)
    budget = 2.0**-24 * truth.abs() + 2 * (fp64.ERROR + largest * 2.0**-50) * size + 2.0**-149
    worst = float(((found.double() - truth).abs() / budget).max())
    print(f"observed / bound: {worst:.3f}")
    assert worst <= 1


@pytest.mark.parametrize("call", CALLS[:2])
def test_a_nan_that_is_seen_reaches_its_rows_only(call):
    heal_call = call_of([(40, 40)], 16, call, numerics="heal", lost=[20])
    found = kernels._attended(PagedAttention.read(*heal_call))
    exact = PagedAttention.read(*heal_call[:-1], "exact5").attend()
    assert torch.equal(found.isnan(), exact.isnan())
    assert found.isnan().any()
    assert not found.isnan().all()


BREAKS = {
    "the largest scale": ("largest = value_scale[n] > largest ? value_scale[n] : largest", ""),
    "fixed point": (
        "std::nearbyint(weight * value_scale[n] * factor)",
        "weight * value_scale[n] * factor",
    ),
    "denominator": ("some += std::nearbyint(", "some += 65536.0 + std::nearbyint("),
    "causality": ("position + 1)", "position + 2)"),
    "a digit of K": ("+ 256 * digits[1 * size + e]", "+ 255 * digits[1 * size + e]"),
}


def broken_kernel(before: str, after: str) -> type[kernels.Kernel]:
    """A kernel whose text says something else in one place."""

    class Broken(kernels.Kernel):
        def source(self) -> str:
            text = super().source()
            assert before in text
            return text.replace(before, after)

    return Broken


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_shows(name, monkeypatch):
    """The inverse."""
    whole, broken = kernels._attender, broken_kernel(*BREAKS[name])
    monkeypatch.setattr(kernels, "_attender", lambda *how: broken(**vars(whole(*how))))
    asked = PagedAttention.read(*call_of([(90, 30), (50, 1)], 16, CALLS[0]))
    assert differing(kernels._attended(asked), asked.attend()) > 0


WEIGHED_BREAKS = {
    "a tanh of FP32": ("hyperbolic_tangent(ratio)", "std::tanh(ratio)"),
    "a tanh that FP64 keeps": ("tangent(ratio)) * CAP", "tangent(ratio) * CAP)"),
    "a ratio that FP64 keeps": ("float ratio = static_cast<float>(", "double ratio = ("),
    "a score that FP64 keeps": ("float>(sum * scale) * SCALE", "float>(sum * scale * SCALE)"),
    "the sink's term": ("std::nearbyint(exponential(sink - top)", "(0.0 * (sink - top)"),
    "the sink's maximum": ("top = sink > top ? sink : top;", ""),
    "the denominator": ("some += std::nearbyint(", "some += 65536.0 + std::nearbyint("),
    "an operand of FP32": ("dequantized(payload[e], factor)", "(payload[e] * factor)"),
    "the largest power of V": ("counted > power ? counted : power", "power > 1.0 ? power : 1.0"),
    "a lost pair": ("0 * plane_step + i * STEP] = above_2", "0 * plane_step + i * STEP] = 0"),
    "causality": ("position + 1)", "position + 2)"),
    "the window": ("position - 9 + 1", "position - 10 + 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHED_BREAKS)
def test_a_broken_kernel_of_caps_and_sinks_shows(name, monkeypatch):
    """The inverse."""
    whole, broken = kernels._weigher, broken_kernel(*WEIGHED_BREAKS[name])
    monkeypatch.setattr(kernels, "_weigher", lambda *how: broken(**vars(whole(*how))))
    call = call_of([(90, 30), (50, 1)], 16, ("odd", "int24", "capped"), sinks=[2.0, 90.0])
    asked = PagedAttention.read(*call)
    assert differing(kernels._attended(asked), asked.attend()) > 0


# ------------------------------------------------------------------------------------------ write


@examples(40)
@given(
    tokens=st.integers(0, 40),
    room=st.sampled_from([1, 16, 32]),
    call=st.sampled_from(CALLS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    special=st.sampled_from([0.0, math.inf, math.nan, 1e-42, 3e38]),
)
def test_cells_have_the_bytes_of_the_reference(tokens, room, call, dtype, special):
    """Padding and strides included; what is not written stays."""
    (_, heads, size, value_size), kv = SIZES[call[0]], call[1]
    pages = torch.full(
        (tokens // room + 2, heads, room, Cell(kv, size, value_size).nbytes), 85, dtype=torch.int8
    )
    order = torch.randperm(len(pages) * room, generator=torch.Generator().manual_seed(tokens))
    slots = order[:tokens].clone()
    slots[1::4] = -1
    both = drawn_states((tokens, heads, size + value_size), 1, 12).to(dtype)
    both[::3, 0, 0], both[1::3, -1, -1] = special, special
    key, value = both.split([size, value_size], -1)  # strided
    found = pages.clone()
    kernels.write(found, key, value, slots, kv)
    paged.write_tokens(pages, key, value, slots, kv)
    assert torch.equal(found, pages)


def test_a_slot_outside_of_the_pages_is_refused_as_the_reference_refuses_it():
    pages = torch.zeros(2, 3, 16, Cell("int16", 64, 64).nbytes, dtype=torch.int8)
    key = torch.randn(2, 3, 64)
    with pytest.raises(IndexError):
        kernels.write(pages, key, key, torch.tensor([0, 32]), "int16")


def test_what_the_kernel_has_no_place_for_stays_with_the_reference():
    for changes in (
        {"numerics": "exact5:h100"},
        {"numerics": "exact5:a100:3"},
        {"numerics": "heal:a100"},
    ):
        assert not kernels._takes(PagedAttention.read(*call_of([(5, 2)], 16, CALLS[0], **changes)))
    capped = list(call_of([(5, 2)], 16, WEIGHED[0]))
    capped[5] = capped[5].double()  # sinks that the reference refuses
    assert not kernels._takes(PagedAttention.read(*capped))
    capped = call_of([(5, 2)], 16, WEIGHED[1])
    for softcap in (math.inf, math.nan, 1e39):
        asked = PagedAttention.read(*capped[:9], softcap, *capped[10:])
        assert not kernels._takes(asked)
    empty = call_of([(5, 0)], 16, CALLS[0])
    assert differing(kernels.attend(*empty), PagedAttention.read(*empty).attend()) == 0


def test_kernels_are_compiled_as_graphs_are():
    assert kernels.SETTINGS.items() <= PINNED_SETTINGS.items()


def test_other_dtypes_and_sizes_are_refused_as_the_reference_refuses_them():
    """None may be read as something else: FP64, heads or tokens that do not fit, INT32 slots."""
    pages = torch.zeros(2, 3, 16, Cell("int16", 64, 64).nbytes, dtype=torch.int8)
    key, slots = torch.randn(4, 3, 64), torch.arange(4)
    with pytest.raises(TypeError, match="float64"):
        kernels.write(pages, key.double(), key, slots, "int16")
    for bad in ((key, key[:, :2], slots), (key, key[:3], slots), (key, key, slots[:3])):
        with pytest.raises((RuntimeError, IndexError)):
            kernels.write(pages, *bad, "int16")
    assert not pages.any()
    again = pages.clone()
    kernels.write(pages, key, key, slots.to(torch.int32), "int16")
    paged.write_tokens(again, key, key, slots, "int16")
    assert torch.equal(pages, again)
    call = call_of([(5, 2)], 16, ("grouped", "int16", "capped"), numerics="heal")
    with pytest.raises(TypeError, match="float64"):
        kernels.attend(call[0].double(), *call[1:])
    with pytest.raises(RuntimeError):
        kernels.attend(*call[:5], call[5][:4], *call[6:])


def test_registered_they_are_the_operators():
    lowering.register()
    call = call_of([(33, 7)], 16, CALLS[0])
    assert differing(heal.paged_attention(*call), PagedAttention.read(*call).attend()) == 0
    with pytest.raises(ValueError, match="keys on the pages"):
        heal.paged_attention(*call[:3], call[3] + 32, *call[4:])
