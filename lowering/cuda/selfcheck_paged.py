"""The part of `selfcheck` of what runs over pages: small batches, written and attended.

What an exact precision gives, and what is written, has the bits of the reference implementation on
CPU. Else a result has to be as close to FP64 as attention in FP32 would have to be: the promise of
`selfcheck_attention`, for one request after another. May import the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from healpass.lowering.cuda.selfcheck_attention import UNIT
from healpass.ops.attention.paged import Cell
from healpass.ops.attention.quantize import Integers
from healpass.ops.attention.scoring import Scoring

WRITE, QUERY, ATTENTION, MERGE = "paged_write", "paged_query", "paged_attention", "attention_merge"
EXACT, SETTLE = (QUERY, "paged_tops", "paged_sums"), "paged_settle"


@dataclass(frozen=True)
class PagedCheck:
    """A batch of requests: three query heads per key head, pages of 16 tokens in any order.

    Attributes:
        templates: What it runs through.
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
    def exact(self) -> bool:
        """Whether bits are compared."""
        return self.numerics.startswith("exact")

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

    def __call__(self, device: str) -> tuple[Tensor, Tensor]:
        """Pages and output, `[T, H, Ev]`, both on CPU."""
        query, key, value = (x.to(device) for x in self.states())
        blocks, slots = (x.to(device) for x in self.places())
        cell, scoring = Cell(self.kv, self.size, value.shape[-1]), self.scoring
        size = (int(blocks.max()) + 1, self.KEY_HEADS, self.ROOM, cell.nbytes)
        pages = torch.full(size, -1, dtype=torch.int8, device=device)  # scales that are NaN
        torch.ops.heal.paged_write(pages, key, value, slots, self.kv)
        starts = torch.tensor((0, *self.queries), device=device).cumsum(0).to(torch.int32)
        lengths = torch.tensor(self.keys, device=device)
        sinks = None if scoring.sinks is None else scoring.sinks.to(device)
        output = torch.ops.heal.paged_attention(
            query, pages, starts, lengths, blocks, sinks, True, scoring.scale, scoring.window,
            scoring.softcap, value.shape[-1], self.kv, self.numerics,
        )  # fmt: skip
        return pages.cpu(), output.cpu()


#: Pages and output of a check.
Run = Callable[[PagedCheck], tuple[Tensor, Tensor]]


def checks() -> Iterator[PagedCheck]:
    """Both formats, few rows and many, few keys and several chunks of them."""
    for kv in ("int16", "int24"):
        for name, templates in (
            ("exact5", EXACT), ("heal", (QUERY, ATTENTION)), ("layercast", (QUERY, ATTENTION)),
        ):  # fmt: skip
            more = (SETTLE,) if name == "exact5" else (MERGE,)
            yield PagedCheck((WRITE, *templates, *more), kv, name, (1, 2, 1), (40, 300, 1))
            yield PagedCheck((WRITE, *templates), kv, name, (30, 1, 70), (45, 20, 70))
    for size in (64, 128):
        for name, templates in (("exact5", EXACT), ("heal", (QUERY, ATTENTION))):
            yield PagedCheck((WRITE, *templates), "int16", name, (40, 1), (40, 70), size)


def examine(run: Run) -> dict[str, str]:
    """Run every check; what is wrong, by template."""
    wrong: dict[str, str] = {}
    for check in checks():
        (pages, output), (wanted_pages, wanted) = run(check), check("cpu")
        bytes_off = int((pages != wanted_pages).sum())
        if bytes_off:
            wrong[WRITE] = f"{check}: {bytes_off} of {pages.numel()} bytes are others"
        elif check.exact:
            bits = int((output.view(torch.int32) != wanted.view(torch.int32)).sum())
            if bits:
                said = f"{check}: {bits} of {output.numel()} elements have other bits"
                wrong |= dict.fromkeys(check.templates[1:], said)
        else:
            worst = _worst(check, output)
            if not worst <= 1:
                said = f"{check}: observed / allowed = {worst:.3g}"
                wrong |= dict.fromkeys(check.templates[1:], said)
    return wrong


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


def on_gpu(index: int) -> Run:
    """Run the operators on a GPU."""
    from healpass import lowering

    lowering.register()
    return lambda check: check(f"cuda:{index}")
