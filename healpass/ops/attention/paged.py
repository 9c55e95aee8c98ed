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


    """Refuse pages that do not hold such cells of so many heads.

    Args:
        pages: INT8 `[P, Hkv, N, C]`.
        heads: Hkv.
        cell: Their format.

    Raises:
        OperandError: They do not.
