"""The kernels over pages, in Triton's interpreter: exact ones bit by bit, others within the bound.

What is rendered here is what a GPU would run; only the interpreter stands in for the GPU. Pages
and queries that belong to nobody are NaN.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, target
from hypothesis import strategies as st
from torch import Tensor

from healpass.lowering.cuda import paged
from healpass.lowering.cuda.paged import PagedProblem
from healpass.lowering.cuda.pages import Pages
from healpass.lowering.cuda.tiles import AttentionTile
from healpass.ops.attention.paged import Cell, PagedAttention
from healpass.ops.attention.scoring import Scoring
from tests.support.attention_bounds import Digits, exact
from tests.support.attention_runs import Change, without_products_of
from tests.support.bits import differing
from tests.support.paged_runs import Batch, attended, interpreted
from tests.support.profiles import examples

heal = torch.ops.heal


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Prefill, chunks of it, decode, and requests without a query or without anything."""
    kinds = st.sampled_from(["prefill", "chunk", "decode", "idle", "nothing"])
    queries, keys = [], []
    for kind in draw(st.lists(kinds, min_size=1, max_size=4)):
        count = 0 if kind == "nothing" else draw(st.integers(1, 45))
        few = min(count, draw(st.integers(1, 20)))
        keys.append(count)
        queries.append({"prefill": count, "chunk": few, "decode": 1}.get(kind, 0))
    return Batch(
        tuple(queries), tuple(keys), draw(st.sampled_from([16, 32, 128])),
        draw(st.sampled_from(["int16", "int24"])),
        draw(st.sampled_from([(1, 1), (1, 2), (2, 3), (1, 7)])),
        draw(st.sampled_from([(16, 16), (16, 24), (40, 4)])), draw(st.integers(0, 2**20)),
    )  # fmt: skip


windows = st.sampled_from([None, None, 1, 9, 40])


@examples(20)
@given(
    batch=batches(),
    window=windows,
    is_causal=st.booleans(),
    capability=st.sampled_from([80, 90, 100, 103]),
    parts=st.sampled_from([1, 3]),
)
def test_exact_has_the_bits_of_its_reference(batch, window, is_causal, capability, parts):
    call = batch.call("exact5", window=window, is_causal=is_causal)
    with pytest.MonkeyPatch.context() as patch:
        if parts > 1:  # keys are shared among programs
            patch.setattr(paged, "DECODE_CHUNK", 32)
        found = attended(*call, capability=capability)
    assert differing(found, PagedAttention.read(*call).attend()) == 0


def test_exact_attention_hands_on_what_is_not_finite():
    batch = Batch((20, 1, 3), (20, 40, 3))
    (query, *rest), rows = batch.call("exact5"), torch.arange(24)
    query[22, 1, 3] = math.inf
    key, value = torch.randn(2, 1, 16), torch.randn(2, 1, 24)
    key[0, 0, 0], value[1, 0, 2] = math.nan, -math.inf
    blocks = rest[3]
    slots = blocks[:2, 0].long() * 16 + torch.tensor([7, 3])
    heal.paged_write(rest[0], key, value, slots, "int16")
    found, wanted = (
        attended(query, *rest), PagedAttention.read(query, *rest).attend(),
    )  # fmt: skip
    assert differing(found, wanted) == 0
    lost = found.isnan().any(-1).any(-1)
    assert rows[lost[:24]].tolist() == [*range(7, 20), 20, 22]


def bound_of(batch: Batch, call: tuple[Any, ...]) -> list[tuple[slice, Tensor, Tensor]]:
    """Rows of the output, what FP64 makes of them `[L, H, Ev]`, and the kernels' bound."""
    _, _, _, _, _, sinks, is_causal, scale, window, softcap, *_ = call
    scoring = Scoring(scale, sinks=sinks, is_causal=is_causal, window=window, softcap=softcap)
    found = []
    for rows, states in batch.requests():
        if rows.stop == rows.start:
            continue
        query, key, value = (Digits.of(x, batch.kv) for x in states)
        before = states[1].shape[2] - states[0].shape[2]
        right = exact(query, key, value, scoring.at(before), joined=True)
        found.append((rows, right.output[0].transpose(0, 1), right.bound[0].transpose(0, 1)))
    return found


def worst_of(batch: Batch, call: tuple[Any, ...], output: Tensor) -> float:
    """The largest observed / bound; infinite where a NaN or a query of nobody shows."""
    worst = 0.0
    for rows, right, bound in bound_of(batch, call):
        error = (output[rows].double() - right).abs()
        ratio = torch.where(error == 0, 0.0, error / bound).nan_to_num(math.inf)
        worst = max(worst, ratio.max().item())
    return worst if (output[sum(batch.queries) :] == 0).all() else math.inf


def run_within(batch: Batch, numerics: str, change: Change | None = None, **how: Any) -> float:
    call = batch.call(numerics, **how)
    return worst_of(batch, call, attended(*call, change=change))


@examples(20)
@given(
    batch=batches(),
    numerics=st.sampled_from(["heal", "heal", "layercast"]),
    window=windows,
    is_causal=st.booleans(),
    softcap=st.sampled_from([None, None, 3.0]),
    with_sinks=st.booleans(),
    capability=st.sampled_from([80, 90, 100]),
)
def test_others_are_within_their_bound(
    batch, numerics, window, is_causal, softcap, with_sinks, capability
):
    heads = math.prod(batch.heads)
    sinks = torch.linspace(-2, 2, heads) if with_sinks else None
    how = {"window": window, "is_causal": is_causal, "softcap": softcap, "sinks": sinks}
    call = batch.call(numerics, **how)
    worst = worst_of(batch, call, attended(*call, capability=capability))
    target(worst, label="observed / bound")
    assert worst <= 1, f"observed / bound = {worst:.3f}"


LONG = Batch((2, 1, 5), (300, 530, 260), heads=(2, 2))


@pytest.mark.parametrize("numerics", ["heal", "layercast", "exact5"])
@pytest.mark.parametrize("how", [{}, {"window": 270, "sinks": torch.linspace(-1, 1, 4)}])
def test_bits_tell_nothing_of_tiles_programs_and_the_batch(numerics, how, monkeypatch):
    """Chunks in one program or in many, more rows per program, and each request alone."""
    how = how if numerics != "exact5" else {"window": how.get("window")}
    call = LONG.call(numerics, **how)
    wanted = attended(*call)
    query, pages, _, lengths, blocks, *rest = call
    for request, (rows, _) in enumerate(LONG.requests()):
        alone = (query[rows], pages, torch.tensor([0, rows.stop - rows.start]))
        one = slice(request, request + 1)
        found = attended(*alone, lengths[one], blocks[one], *rest)
        assert differing(found, wanted[rows]) == 0
    assert (wanted[8:] == 0).all()
    monkeypatch.setattr(paged, "ENOUGH_PROGRAMS", 1)
    assert differing(attended(*call), wanted) == 0
    monkeypatch.setattr(PagedProblem, "tile", AttentionTile(32, 4, 1))
    assert differing(attended(*call), wanted) == 0


def test_long_keys_in_their_chunks_are_within_the_bound():
    assert run_within(LONG, "heal") <= 1
    assert run_within(LONG, "heal", window=270, sinks=torch.linspace(-1, 1, 4)) <= 1


def written(batch: Batch, key: Tensor, value: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Pages by the kernel and by the reference implementation."""
    found, wanted = batch.empty_pages(), batch.empty_pages()
    with interpreted():
        Pages(found, Cell(batch.kv, *batch.sizes)).write(key, value, slots)
    heal.paged_write(wanted, key, value, slots, batch.kv)
    return found, wanted


@examples(20)
@given(batch=batches(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_pages_are_written_as_the_reference_writes_them(batch, dtype):
    """Some tokens go nowhere; some hold what is not finite; K lies transposed."""
    _, key, value = (x.to(dtype) for x in batch.states())
    _, slots = batch.places()
    slots[torch.arange(len(slots)) % 3 == 1] = -1
    key.view(-1)[::37], value.view(-1)[::41] = math.inf, math.nan
    found, wanted = written(batch, key.mT.contiguous().mT, value, slots)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kv", ["int16", "int24"])
def test_the_smallest_and_the_largest_numbers_are_written(kv):
    batch = Batch((), (6,), kv=kv)
    _, key, value = batch.states()
    scales = torch.tensor([0.0, 2.0**-149, 2.0**-130, 1.0, 2.0**100, 3e38])
    key = key.clamp(-1, 1) * scales[:, None, None]
    found, wanted = written(batch, key, value, batch.places()[1])
    assert torch.equal(found, wanted)


# ------------------------------------------------------------------------------ inverse tests

SOME = Batch((20, 1), (40, 37), kv="int24", heads=(2, 2))


def replaced(old: str, new: str) -> Change:
    def change(source: str) -> str:
        return source.replace(old, new)

    return change


def test_a_lost_piece_leaves_the_bound():
    assert run_within(SOME, "heal") <= 1
    assert run_within(SOME, "heal", without_products_of("v_low")) > 1
    assert run_within(SOME, "heal", without_products_of("q_1")) > 1


#: Fault -> what a kernel's text has, and what it has instead.
FAULTS = {
    "the pages in order": (
        "page = tl.load(BLOCKS + request * WIDTH + idx_s // 16",
        "page = 1 + idx_s // 16 + 0 * tl.load(BLOCKS + request * WIDTH + idx_s // 16",
    ),
    "another request's pages": ("BLOCKS + request * WIDTH", "BLOCKS + (1 - request) * WIDTH"),
    "queries at the first keys": ("idx_l = before + row", "idx_l = row"),
    "keys past the end": ("inside_s = idx_s < S", "inside_s = idx_s < S + 3"),
    "a query of another head": (
        "idx_h = idx_hkv * GROUP + row % GROUP",
        "idx_h = idx_hkv * GROUP",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows_in_bits_and_leaves_the_bound(fault):
    change = replaced(*FAULTS[fault])
    assert not run_within(SOME, "heal", change, is_causal=fault != "keys past the end") <= 1
    call = SOME.call("exact5", is_causal=fault != "keys past the end")
    assert differing(attended(*call, change=change), PagedAttention.read(*call).attend()) > 0


def test_a_maximum_of_its_own_in_each_part_shows(monkeypatch):
    """In the second pass every part needs the largest score of the whole row."""
    monkeypatch.setattr(paged, "DECODE_CHUNK", 32)
    call = dataclasses.replace(SOME, kv="int16").call("exact5")
    wanted = PagedAttention.read(*call).attend()
    assert differing(attended(*call), wanted) == 0
    monkeypatch.setattr(Tensor, "amax", lambda x, dim: x.select(dim, 0))
    assert differing(attended(*call), wanted) > 0


def test_a_byte_of_another_rounding_shows():
    batch = Batch((), (9,))
    _, key, value = batch.states()
    slots = batch.places()[1]
    found, wanted = batch.empty_pages(), batch.empty_pages()
    with interpreted(replaced("+ anchor).to(tl.int64", "+ anchor - 0.5).to(tl.int64")):
        Pages(found, Cell(batch.kv, *batch.sizes)).write(key, value, slots)
    heal.paged_write(wanted, key, value, slots, batch.kv)
    assert not torch.equal(found, wanted)
