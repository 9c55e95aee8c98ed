"""`heal::paged_write` and `heal::paged_attention` against attention on contiguous states."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.ops.attention.paged import Cell
from healpass.ops.attention.scoring import Scoring
from tests.support.bits import differing
from tests.support.exact_gpu import integer_states
from tests.support.profiles import examples

heal = torch.ops.heal
HEADS, KEY_HEADS, SIZE, VALUE_SIZE = 4, 2, 16, 24
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
SCALE = 0.25


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q `[T, H, E]`, K `[T, Hkv, E]`, V `[T, Hkv, Ev]` of one request."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, SIZE), (KEY_HEADS, SIZE), (KEY_HEADS, VALUE_SIZE))
    q, k, v = (torch.randn(count, *size, generator=generator) for size in sizes)
    return q, k, v * 2.0 ** torch.randint(-4, 4, (count, 1, 1), generator=generator)


@dataclass
class Pages:
    """Pages that are handed out in a random order; what nobody wrote is poison."""

    room: int
    kv: str = "int16"
    count: int = 64

    def __post_init__(self) -> None:
        cell = Cell(self.kv, SIZE, VALUE_SIZE)
        size = (self.count, KEY_HEADS, self.room, cell.nbytes)
        self.pages = torch.full(size, -1, dtype=torch.int8)  # a scale of such bytes is NaN
        self.free = torch.randperm(self.count, generator=torch.Generator().manual_seed(0)).tolist()
        self.owned: dict[int, list[int]] = {}
        self.written: dict[int, int] = {}

    def write(self, requests: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Append keys and values to each request, all in one call, with padding behind."""
        slots = []
        for request, (key, _) in requests.items():
            owned, start = self.owned.setdefault(request, []), self.written.get(request, 0)
            for place in range(start, start + len(key)):
                if place % self.room == 0:
                    owned.append(self.free.pop())
                slots.append(owned[place // self.room] * self.room + place % self.room)
            self.written[request] = start + len(key)
        key, value = (torch.cat([states[i] for states in requests.values()]) for i in (0, 1))
        key, value = (F.pad(x, (0, 0, 0, 0, 0, 2), value=torch.nan) for x in (key, value))
        heal.paged_write(self.pages, key, value, torch.tensor([*slots, -1, -1]), self.kv)

    def attend(self, requests: dict[int, Tensor], numerics: str = "exact5", **how) -> list[Tensor]:
        """The last queries of each request, in one call: `[T, H, Ev]` each."""
        counts = [len(query) for query in requests.values()]
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        lengths = torch.tensor([self.written[r] for r in requests], dtype=torch.int32)
        most = max(len(self.owned[r]) for r in requests)
        blocks = [self.owned[r] + [-1] * (most - len(self.owned[r])) for r in requests]
        options = {"sinks": None, "window": None, "softcap": None} | how
        result = heal.paged_attention(
            torch.cat(list(requests.values())), self.pages, starts, lengths,
            torch.tensor(blocks, dtype=torch.int32), options["sinks"], True, SCALE,
            options["window"], options["softcap"], VALUE_SIZE, self.kv, numerics,
        )  # fmt: skip
        return list(result.split(counts))


def whole(states: tuple[Tensor, ...], kv: str, numerics: str = "exact5", **how) -> Tensor:
    """`heal::sdpa` of one request at once, `[T, H, Ev]`."""
    q, k, v = (x.transpose(0, 1)[None] for x in states)
    attended = heal.sdpa(
        q, k, v, is_causal=True, scale=SCALE, enable_gqa=True, kv=kv, numerics=numerics, **how
    )
    return attended[0].transpose(0, 1)


HOW = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": SINKS},
    "all": {"window": 4, "softcap": 2.5, "sinks": SINKS},
}


@examples(30)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    chunk=st.integers(1, 17),
    room=st.sampled_from([1, 4, 16, 32]),
    kv=st.sampled_from(["int16", "int24"]),
    how=st.sampled_from(list(HOW)),
)
def test_batches_chunks_and_pages_leave_the_bits_of_the_whole(lengths, chunk, room, kv, how):
    """Ragged batches, prefill in chunks, any page size; what nobody wrote is NaN and not seen."""
    states = {request: tokens(n, seed=request) for request, n in enumerate(lengths)}
    pages, done = Pages(room, kv, count=256), dict.fromkeys(states, 0)
    found: dict[int, list[Tensor]] = {request: [] for request in states}
    while any(done[request] < lengths[request] for request in states):
        step = {
            request: [x[done[request] : done[request] + chunk] for x in states[request]]
            for request in states
            if done[request] < lengths[request]
        }
        pages.write({request: (key, value) for request, (_, key, value) in step.items()})
        attended = pages.attend({request: part[0] for request, part in step.items()}, **HOW[how])
        for request, output in zip(step, attended, strict=True):
            found[request].append(output)
            done[request] += chunk
    for request in states:
        wanted = whole(states[request], kv, **HOW[how])
        assert differing(torch.cat(found[request]), wanted) == 0


@pytest.mark.parametrize("numerics", ["heal", "layercast", "heal:a100"])
def test_other_precisions_are_as_near_as_on_contiguous_states(numerics):
    """The same digits in other blocks: FP32's rounding is all that differs."""
    states = tokens(30, seed=1)
    pages = Pages(8)
    pages.write({0: states[1:]})
    (found,) = pages.attend({0: states[0]}, numerics)
    digits = integer_states(*(x.transpose(0, 1)[None] for x in states), kv="int16")
    call = (*digits, *Scoring(SCALE, is_causal=True).arguments)
    wanted, exact = (
        heal.integer_attention(*call, name)[0][0].transpose(0, 1) for name in (numerics, "exact8")
    )
    distance = float((wanted - exact).abs().max())
    assert float((found - exact).abs().max()) <= 2 * distance + 2.0**-22 * float(exact.abs().max())


def test_a_query_of_no_request_and_a_request_without_a_query():
    q, k, v = tokens(6, seed=2)
    pages = Pages(4)
    pages.write({0: (k, v), 1: (k, v)})
    blocks = torch.tensor([pages.owned[0], pages.owned[1]])
    call = (blocks, None, True, SCALE, None, None, VALUE_SIZE, "int16", "exact5")
    lengths, starts = torch.tensor([6, 6]), torch.tensor([0, 6, 6])
    padded = torch.cat([q, torch.full_like(q[:3], torch.nan)])  # as an engine's padded batch
    found = heal.paged_attention(padded, pages.pages, starts, lengths, *call)
    assert differing(found[:6], whole((q, k, v), "int16")) == 0
    assert (found[6:] == 0).all()


def test_a_page_of_another_request_shows():
    """The inverse."""
    states = {request: tokens(9, seed=request) for request in (0, 1)}
    pages = Pages(4)
    pages.write({request: x[1:] for request, x in states.items()})
    query = {0: states[0][0]}
    (right,) = pages.attend(query)
    pages.owned[0][1] = pages.owned[1][1]
    (wrong,) = pages.attend(query)
    assert differing(wrong[:4], right[:4]) == 0, "rows before it do not see it"
    assert differing(wrong[4:], right[4:]) > 0


@pytest.mark.parametrize(("kv", "digits"), [("int16", 2), ("int24", 3)])
def test_a_cell_is_its_digits_and_two_scales(kv, digits):
    cell = Cell(kv, SIZE, VALUE_SIZE)
    assert cell.nbytes == digits * (SIZE + VALUE_SIZE) + 8
    _, key, value = tokens(7, seed=3)
    key[2, 1, 3] = torch.inf  # its scale is NaN
    packed = cell.pack(key, value)
    assert packed.shape == (7, KEY_HEADS, cell.nbytes)
    read = cell.unpack(packed.transpose(0, 1))
    for found, x in zip(read, (key, value), strict=True):
        for part, wanted in zip(found, heal.quantize(x.transpose(0, 1)[None], kv), strict=True):
            assert differing(part, wanted) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_states_are_written_as_they_are(dtype):
    states = [x.to(dtype) for x in tokens(5, seed=4)]
    pages = Pages(16)
    pages.write({0: states[1:]})
    (found,) = pages.attend({0: states[0]})
    assert differing(found, whole(tuple(x.float() for x in states), "int16")) == 0


def test_what_does_not_fit_is_refused():
    q, k, v = tokens(4, seed=5)
    pages = Pages(4)
    pages.write({0: (k, v)})
    slots = torch.arange(4)
    with pytest.raises(ValueError, match=r"INT8 \[P, Hkv, N, 88\], got torch.float32"):
        heal.paged_write(pages.pages.float(), k, v, slots, "int16")
    with pytest.raises(ValueError, match=r"INT8 \[P, Hkv, N, 128\]"):
        heal.paged_write(pages.pages, k, v, slots, "int24")
    with pytest.raises(ValueError, match="pages of 2 heads do not hold keys of 4 heads"):
        heal.paged_write(pages.pages, q, q[..., :24].repeat(1, 1, 2)[..., :24], slots, "int16")
    with pytest.raises(ValueError, match="kv='fp32' is no format"):
        heal.paged_write(pages.pages, k, v, slots, "fp32")
    starts, lengths = torch.tensor([0, 4]), torch.tensor([4])
    rest = (None, True, SCALE, None, None, VALUE_SIZE, "int16", "exact5")
    table = torch.tensor([pages.owned[0]])
    with pytest.raises(ValueError, match="3 query heads do not share 2 key heads"):
        heal.paged_attention(q[:, :3], pages.pages, starts, lengths, table, *rest)
    for begins, keys, listed, message in (
        ([0, 4], 9, table, r"9 keys on the pages \[\d+\] of 4 each"),  # fewer than it needs
        ([0, 4], 4, -torch.ones_like(table), r"on the pages \[-1\]"),
        ([0, 4], 4, table * 0 + 64, r"there are 64 pages"),
        ([0, 5], 5, table, "has the queries 0 to 5 of 4"),
        ([0, 4], 3, table, "and 3 keys"),
    ):
        with pytest.raises(ValueError, match=message):
            heal.paged_attention(
                q, pages.pages, torch.tensor(begins), torch.tensor([keys]), listed, *rest
            )
    with pytest.raises(ValueError, match="1 requests need 2 starts"):
        heal.paged_attention(q, pages.pages, starts[:1], lengths, table, *rest)


@pytest.mark.parametrize("numerics", ["exact5", "heal"])
def test_opcheck_is_green(numerics):
    q, k, v = tokens(6, seed=6)
    pages = Pages(4)
    pages.write({0: (k, v)})
    call = (
        q, pages.pages, torch.tensor([0, 6]), torch.tensor([6]), torch.tensor([pages.owned[0]]),
        SINKS, True, SCALE, 4, None, VALUE_SIZE, "int16", numerics,
    )  # fmt: skip
    torch.library.opcheck(heal.paged_attention.default, call)
    slots = torch.tensor([0, 1, 2, 3, -1, 5])
    torch.library.opcheck(heal.paged_write.default, (pages.pages, k, v, slots, "int16"))
