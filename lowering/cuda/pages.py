"""Pages of integers as kernels on CUDA see them, and what makes integers. Imports `eager`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.lowering.cuda import eager
from healpass.lowering.cuda.attention import SMALLEST_E, SMALLEST_V
from healpass.lowering.cuda.eager import Launch, Layout
from healpass.ops.attention.paged import SCALE_BYTES, Cell
from healpass.ops.attention.quantize import FORMATS

#: Tuning: rows per program that makes integers, and its warps.
ROWS, WARPS = 4, 1


@dataclass(frozen=True)
class Pages:
    """Pages, from the first key's cell on.

    Attributes:
        memory: INT8 `[P, Hkv, N, C]`.
        cell: What a cell holds.
    """

    memory: Tensor
    cell: Cell

    @property
    def digits(self) -> int:
        """Of K and V."""
        return FORMATS[self.cell.kv].digits

    @property
    def fit(self) -> bool:
        """Whether scales lie where a GPU reads them whole: at multiples of their size."""
        *strides, last = self.memory.stride()
        counts = (*strides, self.cell.nbytes, self.memory.storage_offset())
        return last == 1 and all(count % SCALE_BYTES == 0 for count in counts)

    @property
    def blocks(self) -> tuple[int, int]:
        """Head sizes of K and V, padded as the tensor core needs them."""
        sizes = (self.cell.size, self.cell.value_size)
        padded = (1 << (size - 1).bit_length() for size in sizes)
        block_e, block_v = map(max, padded, (SMALLEST_E, SMALLEST_V))
        return block_e, block_v

    def tensors(self) -> dict[str, Tensor]:
        """What the templates call K, V and their scales: views that begin where the first does."""
        cell, scales = self.cell, self.memory.view(torch.float32)
        first, last = self.digits * cell.size, cell.nbytes // SCALE_BYTES - 1
        return {
            "K": self.memory,
            "V": self.memory.narrow(-1, first, self.digits * cell.value_size),
            "K_SCALE": scales.narrow(-1, last - 1, 1),
            "V_SCALE": scales.narrow(-1, last, 1),
        }

    def layouts(self) -> dict[str, Layout]:
        """As `[1, Hkv, D, S, E]` and `[1, Hkv, S]`, with S in units of a scale's bytes."""
        heads, step = self.memory.shape[1], self.memory.stride(1)
        scale: Layout = ((1, heads, 0), (0, step // SCALE_BYTES, 1))
        found = {"K_SCALE": scale, "V_SCALE": scale}
        for name, size in (("K", self.cell.size), ("V", self.cell.value_size)):
            found[name] = ((1, heads, self.digits, 0, size), (0, step, size, SCALE_BYTES, 1))
        return found

    def knobs(self) -> dict[str, Any]:
        """Digits, padded head sizes, keys of a page, how far pages and keys are apart."""
        page, _, key, _ = (stride // SCALE_BYTES for stride in self.memory.stride())
        block_e, block_v = self.blocks
        return {
            "PAGED": True, "Q_DIGITS": self.digits, "K_DIGITS": self.digits,
            "V_DIGITS": self.digits, "BLOCK_E": block_e, "BLOCK_V": block_v,
            "ROOM": self.memory.shape[2], "PAGE": page, "CELL": key,
        }  # fmt: skip

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write tokens.

        Args:
            key: `[T, Hkv, E]`.
            value: `[T, Hkv, Ev]`.
            slots: INT64 `[T]`; a negative one writes nothing.
        """
        layouts = {"KEY": _layout(key), "VALUE": _layout(value)} | self.layouts()
        tensors = {"KEY": key, "VALUE": value, "SLOTS": slots.contiguous()} | self.tensors()
        self._make_integers("paged_write", layouts, tensors, (key, value))

    def integers(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """INT8 `[T, H, D, E]` and FP32 `[T, H]` of queries `[T, H, E]`, in the pages' format."""
        tokens, heads, size = query.shape
        digits = query.new_empty((tokens, heads, self.digits, size), dtype=torch.int8)
        scale = query.new_empty((tokens, heads), dtype=torch.float32)
        tensors = {"X": query, "Q": digits, "Q_SCALE": scale}
        self._make_integers("paged_query", {"X": _layout(query)}, tensors, (query, digits))
        return digits, scale

    def _make_integers(
        self,
        template: str,
        layouts: dict[str, Layout],
        tensors: dict[str, Tensor],
        tokens: tuple[Tensor, ...],
    ) -> None:
        """Launch it over all rows.

        Args:
            template: Its name.
            layouts: Of what it reads.
            tensors: All that it takes.
            tokens: Those of them that hold all tokens, the first `[T, H, E]`.
        """
        knobs = self.knobs() | {
            "LIMIT": float(FORMATS[self.cell.kv].limit), "ROWS": ROWS,
            "INDEX_DTYPE": eager.index_dtype(*map(eager.span, tokens)),
        }  # fmt: skip
        count, heads, _ = tokens[0].shape
        grid, arguments = (-(-count * heads // ROWS), 1), tensors | {"T": count}
        if count * heads:
            eager.run(Launch.of(template, (layouts, knobs), arguments, grid, num_warps=WARPS))


def _layout(states: Tensor) -> Layout:
    """Of `[T, H, E]`; how many tokens there are is no part of a kernel's text."""
    return (0, *states.shape[1:]), states.stride()
