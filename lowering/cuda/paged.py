"""`heal::paged_write` and `heal::paged_attention` on CUDA, launched at once: no graph holds them.

May import `eager` and `pages` (launches), `attention` and `exact_attention` (numerics), tiles,
`selfcheck`. Nothing is read on the host: grids follow from shapes, and each program finds its
request on the device, so that a CUDA graph may hold the calls. What starts, lengths, blocks and
slots hold is therefore not checked here, as the reference implementation checks it.

A row's bits do not depend on its batch, on tiles, or on how keys are shared among programs: keys
are summed in chunks on a grid that begins at key 0, and chunks are joined first to last. `exact`
has the bits of the reference implementation. That itself runs, and reads the requests on the host,
where sums are simulated or reordered, and for exact attention with a cap or with sinks.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.lowering.cuda import eager, selfcheck
from healpass.lowering.cuda.attention import (
    CHUNK,
    DECODE_ROWS,
    LARGEST_HEAD,
    MERGE,
    keys_per_block,
)
from healpass.lowering.cuda.eager import Launch, Layout
from healpass.lowering.cuda.exact_attention import BLOCK_N, DECODE_CHUNK, EXP
from healpass.lowering.cuda.exact_matmul import capability, terms
from healpass.lowering.cuda.exact_tiles import exact_paged_tile, prefers_half
from healpass.lowering.cuda.matmul import LOWEST_CAPABILITY, chain_k
from healpass.lowering.cuda.pages import ROWS, WARPS, Pages
from healpass.lowering.cuda.tiles import AttentionTile, paged_tile
from healpass.ops.attention.exact_chunks import exponent_above
from healpass.ops.attention.exact_steps import MOST_KEYS, P_BITS, P_DIGITS
from healpass.ops.attention.paged import (
    Cell,
    PagedAttention,
    check_pages,
    paged_attention,
    paged_write,
    write_tokens,
)
from healpass.ops.products.exact import Scheme
from healpass.ops.products.matmul import OPERAND_DTYPES
from healpass.ops.reproducible import fp64
from healpass.ops.reproducible.reduce import ELEMENT_BITS, element_bits

#: Tuning: with fewer programs a GPU has room left, and the keys of a tile are shared among more.
ENOUGH_PROGRAMS = 512
#: Tuning: bytes of what chunks leave, at most; past it a program goes through all chunks itself.
PART_BYTES = 1 << 28

WRITES = ("paged_write",)
ATTENDS = ("paged_query", "paged_attention")  # with `attention_merge`, checked by the same
ATTENDS_EXACTLY = ("paged_query", "paged_tops", "paged_sums", "paged_settle")


@dataclass(frozen=True)
class PagedProblem:
    """One call, and the GPU that it is for.

    Attributes:
        asked: The call.
        capability: As 90 for 9.0.
    """

    asked: PagedAttention
    capability: int

    @property
    def pages(self) -> Pages:
        """K and V."""
        return Pages(self.asked.pages, self.asked.cell)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens T, requests R, and the keys that a request has at most."""
        asked = self.asked
        return len(asked.query), len(asked.lengths), asked.blocks.shape[1] * asked.pages.shape[2]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads H, key heads Hkv, and how many of the first share one of the second."""
        heads, key_heads = self.asked.query.shape[1], self.asked.pages.shape[1]
        return heads, key_heads, heads // max(key_heads, 1)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to attend from, or nothing to attend to."""
        return 0 in (*self.sizes, *self.heads, *self.asked.query.shape, self.asked.cell.value_size)

    @property
    def exact(self) -> bool:
        """Whether the precision is."""
        return self.asked.how.products is not None

    @property
    def layercast(self) -> bool:
        """Whether P V is in FP32."""
        return self.asked.how.precision == "layercast"

    @property
    def tile(self) -> AttentionTile:
        """Tuning: by how many rows a request has on average."""
        tokens, requests, _ = self.sizes
        decodes = tokens * self.heads[2] <= DECODE_ROWS * requests
        kind = (self.capability, max(self.pages.blocks), self.pages.digits)
        if self.exact:
            return exact_paged_tile(*kind, decodes=decodes)
        return paged_tile(*kind, decodes=decodes, layercast=self.layercast)

    @property
    def programs(self) -> int:
        """Tiles times key heads: request r has tiles from `starts[r] group // block + r` on."""
        tokens, requests, _ = self.sizes
        return (tokens * self.heads[2] // self.tile.block + requests) * self.heads[1]

    def knobs(self) -> dict[str, Any]:
        """Those that both precisions' kernels share."""
        scoring, pages = self.asked.scoring, self.pages
        block = keys_per_block(max(pages.blocks), pages.digits, chain_k(self.capability))
        return pages.knobs() | {
            "HAS_MASK": False, "HAS_SINKS": scoring.sinks is not None, "DROPOUT_P": 0.0,
            "CAUSAL": scoring.is_causal, "SCALE": float(scoring.scale), "WINDOW": scoring.window,
            "SOFTCAP": scoring.softcap, "BLOCK_M": self.tile.block,
            "BLOCK_N": BLOCK_N if self.exact else block,
        }  # fmt: skip

    def arguments(self) -> dict[str, Tensor | int]:
        """What the kernels read: queries as integers, pages, and which are whose."""
        asked = self.asked
        query, scale = self.pages.integers(asked.query)
        starts, lengths, blocks = (
            x.contiguous() for x in (asked.starts, asked.lengths, asked.blocks)
        )
        found: dict[str, Tensor | int] = {
            "Q": query, "Q_SCALE": scale, "STARTS": starts, "LENGTHS": lengths, "BLOCKS": blocks,
            "R": len(lengths), "STEPS": len(lengths).bit_length(), "WIDTH": blocks.shape[1],
            "T": len(query), **self.pages.tensors(),
        }  # fmt: skip
        sinks = asked.scoring.sinks
        return found if sinks is None else found | {"SINKS": sinks.contiguous()}

    def layouts(self) -> dict[str, Layout]:
        """Of what `arguments` gives. How many tokens there are is no part of a kernel's text."""
        heads, (size, digits) = self.heads[0], (self.asked.cell.size, self.pages.digits)
        row = heads * digits * size
        return self.pages.layouts() | {
            "Q": ((1, heads, digits, 0, size), (0, digits * size, size, row, 1)),
            "Q_SCALE": ((1, heads, 0), (0, 1, heads)),
            "SINKS": ((heads,), (1,)),
        }

    def launch(
        self,
        template: str,
        knobs: dict[str, Any],
        arguments: dict[str, Tensor | int],
        splits: int = 1,
    ) -> None:
        """One kernel over the tiles of all requests.

        Args:
            template: Its name.
            knobs: Beside those that all share.
            arguments: All that it takes.
            splits: Programs that share the keys of a tile.
        """
        (tokens, heads, size), cell = self.asked.query.shape, self.asked.cell
        places = tokens * heads * max(self.pages.digits * size, splits * cell.value_size)
        knobs = self.knobs() | knobs | {"INDEX_DTYPE": eager.index_dtype(places)}
        grid, warps, stages = (self.programs, splits), self.tile.num_warps, self.tile.num_stages
        tables = (self.layouts(), knobs)
        eager.run(Launch.of(template, tables, arguments, grid, num_warps=warps, num_stages=stages))


def attend(problem: PagedProblem) -> Tensor:
    """FP32 `[T, H, Ev]`."""
    if problem.empty:
        return problem.asked.results().zero_()
    return _attend_exactly(problem) if problem.exact else _attend(problem)


def _attend(problem: PagedProblem) -> Tensor:
    """With a running maximum: chunk by chunk in one program, or each in its own."""
    tokens, _, keys = problem.sizes
    (heads, key_heads, group), size = problem.heads, problem.asked.cell.value_size
    chunks, arguments = -(-keys // CHUNK), problem.arguments()
    knobs = {"CHUNK": CHUNK, "LAYERCAST": problem.layercast}
    part_bytes = 4 * tokens * heads * chunks * size
    if chunks == 1 or problem.programs >= ENOUGH_PROGRAMS or part_bytes > PART_BYTES:
        output = problem.asked.results().zero_()
        problem.launch("paged_attention", knobs | {"SPLIT": False}, arguments | {"OUT": output})
        return output
    parts, query = (tokens, key_heads, chunks, group), problem.asked.query
    top, total, part = (
        query.new_empty(size, dtype=torch.float32) for size in (parts, parts, (*parts, size))
    )
    # Where a row sees nothing of a chunk, nothing else is written.
    arguments |= {"TOP": top, "TOTAL": total.zero_(), "PART": part, "CHUNKS": chunks}
    problem.launch("paged_attention", knobs | {"SPLIT": True}, arguments, chunks)
    return _merge(problem, arguments)


def _merge(problem: PagedProblem, arguments: dict[str, Tensor | int]) -> Tensor:
    """Each row's chunks, first to last. A token is to the template what a batch entry is."""
    output = problem.asked.results()
    tokens, heads, size = output.shape
    _, key_heads, group = problem.heads
    chunks = int(arguments["CHUNKS"])
    layouts: dict[str, Layout] = {
        "OUT": ((0, heads, 1, size), (heads * size, size, size, 1)),
        "PART": ((0, key_heads, chunks, group, size), ()),
        "SINKS": problem.layouts()["SINKS"],
    }
    sinks = problem.asked.scoring.sinks
    knobs: dict[str, Any] = {
        "HAS_SINKS": sinks is not None, "BLOCK_V": problem.pages.blocks[1], **MERGE,
        "INDEX_DTYPE": eager.index_dtype(tokens * heads * chunks * size),
    }  # fmt: skip
    arguments = arguments | {"OUT": output, "LOGSUMEXP": output.new_empty((tokens, heads))}
    grid = (tokens * heads, 1)
    eager.run(Launch.of("attention_merge", (layouts, knobs), arguments, grid, num_warps=1))
    return output


def _attend_exactly(problem: PagedProblem) -> Tensor:
    """In two passes, of which maxima and integer sums are all that is handed on."""
    tokens, _, keys = problem.sizes
    asked, half = problem.asked, prefers_half(problem.capability)
    splits = max(1, min(ENOUGH_PROGRAMS // problem.programs, -(-keys // DECODE_CHUNK)))
    arguments = problem.arguments() | {"SPLITS": splits}
    new, size = asked.query.new_empty, (splits, tokens, problem.heads[0])
    tops, largest = (new(size, dtype=dtype) for dtype in (torch.float64, torch.float32))
    # A query of no request has no program.
    arguments |= {"TOP": tops.fill_(-math.inf), "LARGEST": largest.zero_()}
    problem.launch("paged_tops", {"HALF": half}, arguments, splits)

    top, output = tops.amax(0), asked.results().zero_()
    factor = fp64.two_to(P_BITS - exponent_above(largest.amax(0)))
    arguments |= {"TOP": top, "FACTOR": factor, "OUT": output}
    span = terms(Scheme(P_DIGITS, problem.pages.digits, 0), half=half) // BLOCK_N * BLOCK_N
    spans = {"SPAN": span, "LONG": (-(-keys // BLOCK_N) // splits + 1) * BLOCK_N > span}
    knobs = spans | {"HALF": half, "WHOLE": splits == 1, "UNIT": 2.0**ELEMENT_BITS, **EXP}
    if splits > 1:
        part = new((*size, asked.cell.value_size), dtype=torch.int64)
        arguments |= {"PART": part, "TOTAL": new(size, dtype=torch.int64)}
    problem.launch("paged_sums", knobs, arguments, splits)
    if splits > 1:
        _settle(problem, arguments)
    return output


def _settle(problem: PagedProblem, arguments: dict[str, Tensor | int]) -> None:
    """Each row's parts, in any order: they are integers."""
    (tokens, _, _), (heads, _, _) = problem.sizes, problem.heads
    knobs = problem.knobs() | {
        "UNIT": 2.0**ELEMENT_BITS, "ROWS": ROWS, "INDEX_DTYPE": "tl.int64",
    }  # fmt: skip
    grid, tables = (-(-tokens * heads // ROWS), 1), (problem.layouts(), knobs)
    eager.run(Launch.of("paged_settle", tables, arguments, grid, num_warps=WARPS))


# ------------------------------------------------------------------------------------ operators


def without_kernels(problem: PagedProblem) -> str | None:
    """Why the kernels cannot take a call, or None."""
    asked, (_, _, keys) = problem.asked, problem.sizes
    reason = unfit(asked.query, problem.pages)
    if reason is not None or not problem.exact:
        return reason
    if asked.scoring.softcap is not None or asked.scoring.sinks is not None:
        return "exact attention with a cap or with sinks goes by weights, which have no kernel"
    most = 1 << MOST_KEYS[problem.pages.digits]
    if keys > most or element_bits(keys) != ELEMENT_BITS:
        return f"the pages listed hold {keys} keys, and sums in INT64 have room for {most}"
    return None


def unfit(states: Tensor, pages: Pages) -> str | None:
    """Why no kernel can take states and pages, or None.

    Args:
        states: Queries or keys.
        pages: The pages.
    """
    if states.device.type != "cuda" or torch.version.hip is not None:
        return f"{states.device.type} is not an NVIDIA GPU"
    found = capability(states.device)
    if found < LOWEST_CAPABILITY:
        return f"compute capability {found / 10} is below 8.0, which has no BF16 tensor cores"
    sizes = (pages.cell.size, pages.cell.value_size)
    if not all(0 < size <= LARGEST_HEAD for size in sizes):
        return f"head sizes {list(sizes)} are not from 1 to {LARGEST_HEAD}"
    if not pages.fit:
        return f"cells of {pages.cell.nbytes} bytes do not hold their scales at multiples of 4"
    return None


def attend_on_cuda(*call: Any) -> Tensor:
    """`heal::paged_attention` on CUDA.

    Args:
        *call: The arguments of the operator.
    """
    asked = PagedAttention.read(*call)
    how = asked.how
    if not how.plain or asked.query.dtype not in OPERAND_DTYPES:
        return asked.attend()
    problem = PagedProblem(asked, capability(asked.query.device))
    reason = without_kernels(problem)
    if reason is not None:
        _warn("attention over pages", reason)
        return asked.attend()
    if problem.exact:
        for name in ATTENDS_EXACTLY:
            selfcheck.require(name, asked.query.device)
    elif not selfcheck.usable(ATTENDS, asked.query.device, "attention over pages"):
        return asked.attend()
    return attend(problem)


def write_on_cuda(pages: Tensor, key: Tensor, value: Tensor, slots: Tensor, kv: str) -> None:
    """`heal::paged_write` on CUDA.

    Args:
        pages: INT8 `[P, Hkv, N, C]`, changed in place.
        key: `[T, Hkv, E]`.
        value: `[T, Hkv, Ev]`.
        slots: INT64 `[T]`.
        kv: `int16` or `int24`.
    """
    target = Pages(pages, Cell(kv, key.shape[-1], value.shape[-1]))
    check_pages(pages, key.shape[1], target.cell)
    reason = unfit(key, target)
    if reason is not None:
        _warn("writing into pages", reason)
    known = {key.dtype, value.dtype} <= set(OPERAND_DTYPES)
    if reason is None and known and selfcheck.usable(WRITES, key.device, "writing into pages"):
        target.write(key, value, slots)
    else:
        write_tokens(pages, key, value, slots, kv)


def _warn(what: str, reason: str) -> None:
    message = f"{what} runs without a kernel of its own: {reason}."
    warnings.warn(message, selfcheck.TemplateWarning, stacklevel=3)


#: Operator -> what runs where its tensors are on CUDA.
KERNELS = {paged_attention: attend_on_cuda, paged_write: write_on_cuda}
