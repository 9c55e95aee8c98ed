"""The part of `selfcheck` of what runs over pages: small batches, written or attended.

What an exact precision gives, and what is written, has the bits of the reference implementation on
CPU. Else a result has to be as close to FP64 as attention in FP32 would have to be: the promise of
`selfcheck_attention`, for one request after another. (Chunks of its keys are joined by
`attention_merge`, whose own checks are there.) May import `checking`, and the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.lowering.cuda.checking import each
from healpass.lowering.cuda.selfcheck_attention import UNIT
from healpass.ops.attention.paged import Cell, PagedAttention, write_tokens
from healpass.ops.attention.quantize import Integers
from healpass.ops.attention.scoring import Scoring

WRITE, ATTENDED = "paged_write", ("paged_query", "paged_attention")
EXACT, SETTLE = ("paged_query", "paged_tops", "paged_sums"), "paged_settle"


@dataclass(frozen=True)
class PagedCheck:
    """A batch of requests: three query heads per key head, pages of 16 tokens in any order.

    Attributes:
        templates: What it runs through; `WRITE` alone if pages are only written.
        kv: Format of the pages.
        numerics: As the operator takes it.
        queries: Of each request.
        keys: Of each request.
        size: Of a head; values are half as wide again.
    """

    templates: tuple[str, ...]
    kv: str
    numerics: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    size: int = 16

    #: Query heads, key heads, tokens of a page.
    HEADS, KEY_HEADS, ROOM = 6, 2, 16

    @property
    def writes(self) -> bool:
        """Whether pages are written, and not attended."""
        return self.templates == (WRITE,)

    @property
    def exact(self) -> bool:
        """Whether bits are compared."""
        return self.writes or self.numerics.startswith("exact")

    @property
    def scoring(self) -> Scoring:
        """A window; without bits to compare, a cap and sinks."""
        more = {} if self.exact else {"softcap": 6.0, "sinks": torch.linspace(-1, 1, self.HEADS)}
        window = max(self.keys) - 3
        return Scoring(self.size**-0.5, is_causal=True, window=window, **more)  # type: ignore[arg-type]

    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q of all requests, `[T, H, E]`, K `[S, Hkv, E]` and V, of all their keys."""
        generator = torch.Generator().manual_seed(0)
        tokens, keys, wide = sum(self.queries), sum(self.keys), self.size * 3 // 2
        sizes = (
            (tokens, self.HEADS, self.size), (keys, self.KEY_HEADS, self.size),
            (keys, self.KEY_HEADS, wide),
        )  # fmt: skip
        query, key, value = (torch.randn(*size, generator=generator) for size in sizes)
        return query, key, value * 2.0 ** torch.randint(-4, 4, (keys, 1, 1), generator=generator)

    def places(self) -> tuple[Tensor, Tensor]:
        """Pages of each request, `[R, M]`, and the slot of each key, `[S]`."""
        rooms = [-(-keys // self.ROOM) for keys in self.keys]
        order = torch.randperm(sum(rooms), generator=torch.Generator().manual_seed(1)) + 1
        listed = order.split(rooms)
        slots = [
            (pages[:, None] * self.ROOM + torch.arange(self.ROOM)).flatten()[:keys]
            for pages, keys in zip(listed, self.keys, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(list(listed), True), torch.cat(slots)

    def empty_pages(self) -> Tensor:
        """Pages whose scales are NaN."""
        cell = Cell(self.kv, self.size, self.size * 3 // 2)
        count = int(self.places()[0].max()) + 1
        return torch.full((count, self.KEY_HEADS, self.ROOM, cell.nbytes), -1, dtype=torch.int8)

    def writing(self) -> tuple[Any, ...]:
        """The arguments of `heal::paged_write`."""
        _, key, value = self.states()
        return self.empty_pages(), key, value, self.places()[1], self.kv

    def attending(self) -> tuple[Any, ...]:
        """The arguments of `heal::paged_attention`; the reference has written the pages."""
        pages, *written = self.writing()
        write_tokens(pages, *written)
        query, _, value = self.states()
        starts = torch.tensor((0, *self.queries)).cumsum(0).to(torch.int32)
        scoring = self.scoring
        return (
            query, pages, starts, torch.tensor(self.keys), self.places()[0], scoring.sinks, True,
            scoring.scale, scoring.window, scoring.softcap, value.shape[-1], self.kv,
            self.numerics,
        )  # fmt: skip

    def __call__(self, device: str) -> Tensor:
        """The pages, or the output `[T, H, Ev]`, of the operator on a device."""
        call = [
            x.to(device) if isinstance(x, Tensor) else x
            for x in (self.writing() if self.writes else self.attending())
        ]
        if self.writes:
            torch.ops.heal.paged_write(*call)
            return call[0].cpu()
        output: Tensor = torch.ops.heal.paged_attention(*call)
        return output.cpu()

    def reference(self) -> Tensor:
        """The same by the reference implementation, on CPU."""
        if not self.writes:
            return PagedAttention.read(*self.attending()).attend()
        pages, *written = self.writing()
        write_tokens(pages, *written)
        return pages


#: Pages or output of a check.
Run = Callable[[PagedCheck], Tensor]


def checks() -> Iterator[PagedCheck]:
    """Both formats, few rows and many, few keys and several chunks of them."""
    for kv in ("int16", "int24"):
        yield PagedCheck((WRITE,), kv, "heal", (1, 2, 1), (40, 300, 1))
        for name in ("exact5", "heal", "layercast"):
            templates: tuple[str, ...] = EXACT if name == "exact5" else ATTENDED
            chunked = (*EXACT, SETTLE) if name == "exact5" else ATTENDED
            yield PagedCheck(chunked, kv, name, (1, 2, 1), (40, 300, 1))
            yield PagedCheck(templates, kv, name, (30, 1, 70), (45, 20, 70))
    for size in (64, 128):
        for name, names in (("exact5", EXACT), ("heal", ATTENDED), ("heal", (WRITE,))):
            yield PagedCheck(names, "int16", name, (40, 1), (40, 70), size)


def faults(check: PagedCheck, found: Tensor) -> dict[str, str]:
    """What is wrong with what a check gave, by template."""
    said = ""
    if check.exact:
        wanted = check.reference()
        kind = torch.int8 if check.writes else torch.int32
        off = int((found.view(kind) != wanted.view(kind)).sum())
        unit = "bytes are others" if check.writes else "elements have other bits"
        said = f"{off} of {wanted.numel()} {unit}" if off else ""
    else:
        worst = _worst(check, found)
        said = "" if worst <= 1 else f"observed / allowed = {worst:.3g}"
    return dict.fromkeys(check.templates, f"{check}: {said}") if said else {}


def examine(run: Run, chosen: Iterable[PagedCheck] | None = None) -> dict[str, str]:
    """Run every check, or the chosen ones; what is wrong, by template."""
    return each(checks() if chosen is None else chosen, run, faults)


def _worst(check: PagedCheck, output: Tensor) -> float:
    """The largest error, of what is allowed."""
    query, key, value = (
        Integers.of(x.transpose(0, 1)[None], check.kv).dequantized()[0].double()
        for x in check.states()
    )
    found = output.transpose(0, 1).double()
    parts = zip(
        query.split(check.queries, 1), key.split(check.keys, 1), value.split(check.keys, 1),
        found.split(check.queries, 1), strict=True,
    )  # fmt: skip
    worst = 0.0
    for q, k, v, result in parts:
        exact, allowed = _promise(check, q, k, v)
        error = (result - exact).abs()
        ratio = torch.where(error == 0, 0.0, error / allowed).nan_to_num(math.inf)
        worst = max(worst, ratio.max().item())
    return worst


def _promise(
    check: PagedCheck, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """One request's output in FP64, `[H, L, Ev]`, and the error that is allowed.

    Args:
        check: How it scores.
        query: `[H, L, E]`.
        key: `[Hkv, S, E]`.
        value: `[Hkv, S, Ev]`.
    """
    key, value = (x.repeat_interleave(check.HEADS // check.KEY_HEADS, 0) for x in (key, value))
    scoring = check.scoring.at(key.shape[1] - query.shape[1])
    everything = (slice(0, query.shape[1]), slice(0, key.shape[1]))
    capped, _ = scoring.cap(scoring.scale * (query @ key.mT))
    scores = scoring.hide(capped, *everything)
    weights, _ = scoring.softmax(scores[None])
    magnitude = (
        scoring.scale * (query.abs() @ key.abs().mT).max() + scores[scores.isfinite()].abs().max()
    )
    count = value.shape[-1] + key.shape[1] + 16
    relative = 2 * (check.size + 4) * UNIT * magnitude + count * UNIT
    return weights[0] @ value, relative * (weights[0] @ value.abs())


def together(device: str) -> Callable[[Sequence[PagedCheck]], Sequence[Tensor]]:
    """Run checks on a device, one after another: their kernels are in no graph."""
    from healpass import lowering

    lowering.register()
    return lambda chosen: [check(device) for check in chosen]


def on_gpu(index: int) -> Run:
    """Run the operators on a GPU."""
    run = together(f"cuda:{index}")
    return lambda check: run([check])[0]
