"""Keys and values in pages, as serving engines keep them: `heal::paged_write`, `paged_attention`.

A page holds the cells of N tokens, `[Hkv, N, C]` INT8. A cell is one token's K and V of one head::

    K digits | V digits | K scale | V scale        C = D (E + Ev) + 8 bytes

with the digits plane by plane and the scales in FP32, as `heal::quantize` makes them. A cell
depends on its own token's states only, so it does not show in which batch, chunk or page it was
written. Requests of a batch are ragged: request r has the queries `starts[r]` to `starts[r + 1]`,
which are the last of its `lengths[r]` tokens; `blocks[r]` lists its pages in order.

The reference implementation attends request by request, over the cells that it gathers. With an
exact `numerics` its bits are those of `heal::sdpa` on contiguous states (`attention.exact`).
Imports `attention.integers`, `attention.exact_capped` and below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.errors import OperandError
from healpass.ops.attention.exact_capped import attend_by_weights
from healpass.ops.attention.integers import attention_of
from healpass.ops.attention.quantize import FORMATS, Integers
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.numerics import Numerics

SCALE_BYTES = 4


@dataclass(frozen=True)
class Cell:
    """What a page keeps of one token and one head.

    Attributes:
        kv: `int16` or `int24`.
        size: Elements of a key, E.
        value_size: Elements of a value, Ev.

    Raises:
        OperandError: `kv` is no format of integers.
    """

    kv: str
    size: int
    value_size: int

    def __post_init__(self) -> None:
        """Check the format."""
        if self.kv not in FORMATS:
            raise OperandError(
                f"pages hold integers, and kv={self.kv!r} is no format of them.\n"
                f"Use kv={' or '.join(map(repr, FORMATS))}."
            )

    @property
    def nbytes(self) -> int:
        """C."""
        return FORMATS[self.kv].digits * (self.size + self.value_size) + 2 * SCALE_BYTES

    def pack(self, key: Tensor, value: Tensor) -> Tensor:
        """INT8 `[T, Hkv, C]` of `[T, Hkv, E]` and `[T, Hkv, Ev]`."""
        states = [Integers.of(x.transpose(0, 1)[None], self.kv) for x in (key, value)]
        digits = [x.digits[0].permute(2, 0, 1, 3).flatten(2) for x in states]
        scales = [x.scale[0].mT.contiguous().unsqueeze(-1).view(torch.int8) for x in states]
        return torch.cat([*digits, *scales], -1)

    def unpack(self, cells: Tensor) -> tuple[Integers, Integers]:
        """K and V, `[1, Hkv, S, E]` and `[1, Hkv, S, Ev]`, of cells `[Hkv, S, C]`."""
        count = FORMATS[self.kv].digits
        digits, scales = cells.split([self.nbytes - 2 * SCALE_BYTES, 2 * SCALE_BYTES], -1)
        scales = scales.contiguous().view(torch.float32)
        parts = digits.split([count * self.size, count * self.value_size], -1)
        planes = [part.unflatten(-1, (count, -1)).transpose(1, 2)[None] for part in parts]
        key, value = (Integers(x, scales[None, ..., i]) for i, x in enumerate(planes))
        return key, value


def write_tokens(pages: Tensor, key: Tensor, value: Tensor, slots: Tensor, kv: str) -> None:
    """Write tokens into pages.

    Args:
        pages: INT8 `[P, Hkv, N, C]`, changed in place.
        key: `[T, Hkv, E]` in FP16, BF16 or FP32.
        value: `[T, Hkv, Ev]`, any of those.
        slots: INT64 `[T]`: page times N plus place in it; a negative one writes nothing.
        kv: `int16` or `int24`.

    Raises:
        OperandError: Pages of another format or size, or `kv` is no format of integers.
        DtypeError: Keys or values of another dtype.
    """
    cell = Cell(kv, key.shape[-1], value.shape[-1])
    check_pages(pages, key.shape[1], cell)
    written = slots >= 0
    target, cells = slots[written], cell.pack(key[written], value[written])
    pages[target // pages.shape[2], :, target % pages.shape[2]] = cells


paged_write = torch.library.custom_op("heal::paged_write", write_tokens, mutates_args=("pages",))


@paged_write.register_fake
def _(pages: Tensor, key: Tensor, value: Tensor, slots: Tensor, kv: str) -> None:  # noqa: ARG001
    check_pages(pages, key.shape[1], Cell(kv, key.shape[-1], value.shape[-1]))


def check_pages(pages: Tensor, heads: int, cell: Cell) -> None:
    """Refuse pages that do not hold such cells of so many heads.

    Args:
        pages: INT8 `[P, Hkv, N, C]`.
        heads: Hkv.
        cell: Their format.

    Raises:
        OperandError: They do not.
    """
    if pages.dtype != torch.int8 or pages.dim() != 4 or pages.shape[3] != cell.nbytes:
        raise OperandError(
            f"pages of {cell.kv} with keys of {cell.size} and values of {cell.value_size} "
            f"elements are INT8 [P, Hkv, N, {cell.nbytes}], got {pages.dtype} "
            f"{list(pages.shape)}.\n"
            "A cell is D (E + Ev) + 8 bytes, D = 2 digits for int16 and 3 for int24."
        )
    if pages.shape[1] != heads:
        raise OperandError(
            f"pages of {pages.shape[1]} heads do not hold keys of {heads} heads.\n"
            "Allocate the pages for the heads of this rank."
        )


@dataclass(frozen=True)
class PagedAttention:
    """One call of `heal::paged_attention`.

    Attributes:
        query: `[T, H, E]` of all requests, one after another.
        pages: INT8 `[P, Hkv, N, C]`.
        starts: INT `[R + 1]`, where each request's queries begin, and T.
        lengths: INT `[R]`, tokens of each request, its queries included.
        blocks: INT `[R, M]`, its pages in order, anything behind them.
        scoring: What decides a weight; its offset is set per request.
        cell: Format of the pages.
        how: `heal`, `layercast` or an exact precision.
    """

    query: Tensor
    pages: Tensor
    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    scoring: Scoring
    cell: Cell
    how: Numerics

    @classmethod
    def read(
        cls,
        query: Tensor,
        pages: Tensor,
        starts: Tensor,
        lengths: Tensor,
        blocks: Tensor,
        *rest: Any,
    ) -> PagedAttention:
        """Read and check the arguments of the operator.

        Args:
            query: As the attribute.
            pages: As the attribute.
            starts: As the attribute.
            lengths: As the attribute.
            blocks: As the attribute.
            *rest: `sinks`, `is_causal`, `scale`, `window`, `softcap`, `value_size`, `kv` and
                `numerics` of the operator.

        Raises:
            OperandError: Sizes do not fit, or `kv` is no format of integers.
        """
        sinks, is_causal, scale, window, softcap, value_size, kv, numerics = rest
        cell = Cell(kv, query.shape[-1], value_size)
        check_pages(pages, pages.shape[1], cell)
        if query.shape[1] % max(pages.shape[1], 1):
            raise OperandError(
                f"{query.shape[1]} query heads do not share {pages.shape[1]} key heads evenly.\n"
                "Allocate the pages for the key heads of this rank."
            )
        if len(starts) != len(lengths) + 1 or len(blocks) != len(lengths):
            raise OperandError(
                f"{len(lengths)} requests need {len(lengths) + 1} starts and as many lists of "
                f"pages as requests, got {len(starts)} and {len(blocks)}.\n"
                "starts ends with the number of queries."
            )
        scoring = Scoring(scale, sinks=sinks, is_causal=is_causal, window=window, softcap=softcap)
        how = Numerics.parse(numerics)
        return cls(query, pages, starts, lengths, blocks, scoring, cell, how)

    def results(self) -> Tensor:
        """Memory for the output, FP32 `[T, H, Ev]`."""
        size = (*self.query.shape[:2], self.cell.value_size)
        return self.query.new_empty(size, dtype=torch.float32)

    def attend(self) -> Tensor:
        """The output, 0 for a query that belongs to no request or sees no key."""
        output = self.results().zero_()
        for rows, key, value in self._requests():
            query = Integers.of(self.query[rows].transpose(0, 1)[None], self.cell.kv)
            before = key.shape[2] - (rows.stop - rows.start)
            attended = self._attended(query, key, value, self.scoring.at(before))
            output[rows] = attended[0].transpose(0, 1)
        return output

    def _requests(self) -> Iterator[tuple[slice, Integers, Integers]]:
        """Queries of each request that has some, and all of its keys and values."""
        starts, room = self.starts.tolist(), self.pages.shape[2]
        for request, keys in enumerate(self.lengths.tolist()):
            rows = slice(starts[request], starts[request + 1])
            if rows.stop <= rows.start or not keys:
                continue
            pages = self.blocks[request, : -(-keys // room)].to(torch.int64)
            self._check_request(request, rows, keys, pages)
            cells = self.pages[pages].transpose(0, 1).flatten(1, 2)[:, :keys]
            yield rows, *self.cell.unpack(cells)

    def _check_request(self, request: int, rows: slice, keys: int, pages: Tensor) -> None:
        """Refuse what would be read from nowhere, or from a page of nobody."""
        count, room, tokens = self.pages.shape[0], self.pages.shape[2], len(self.query)
        queries = rows.stop - rows.start
        if not 0 <= rows.start <= rows.stop <= tokens or queries > keys:
            raise OperandError(
                f"request {request} has the queries {rows.start} to {rows.stop} of {tokens}, and "
                f"{keys} keys.\nlengths counts a request's queries, too, and starts ends with "
                "their number."
            )
        if len(pages) * room < keys or int(pages.min()) < 0 or int(pages.max()) >= count:
            raise OperandError(
                f"request {request} has {keys} keys on the pages {pages.tolist()} of {room} each; "
                f"there are {count} pages.\nList its pages in blocks, in order."
            )

    def _attended(
        self, query: Integers, key: Integers, value: Integers, scoring: Scoring
    ) -> Tensor:
        weighed = scoring.softcap is not None or scoring.sinks is not None
        if self.how.products is not None and weighed:
            states = (query.dequantized(), key.dequantized(), value.dequantized())
            return attend_by_weights(states, scoring, self.cell.kv, str(self.how))
        return attention_of(query, key, value, scoring, self.how).attend()[0]


SCHEMA = (
    "(Tensor query, Tensor pages, Tensor starts, Tensor lengths, Tensor blocks, Tensor? sinks, "
    "bool is_causal, float scale, SymInt? window, float? softcap, SymInt value_size, str kv, "
    "str numerics) -> Tensor"
)
paged_attention = torch.library.custom_op(
    "heal::paged_attention",
    lambda *call: PagedAttention.read(*call).attend(),
    mutates_args=(),
    schema=SCHEMA,
)
paged_attention.register_fake(lambda *call: PagedAttention.read(*call).results())
