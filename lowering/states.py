"""Queries, keys or values as a lowering of attention gets them, on either device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from healpass.lowering import compat


@dataclass(frozen=True)
class States:
    """Q, K or V: digits `[B, H, D, S, E]` with scales `[B, H, S]`, or `[B, H, S, E]` as stored."""

    data: Any
    scale: Any = None

    @property
    def digits(self) -> int:
        """Number of digits; 0 for states as stored."""
        return 0 if self.scale is None else compat.as_int(self.data.get_size()[2])

    @property
    def size(self) -> tuple[Any, ...]:
        """B, H, S, E."""
        batch, heads, *_, length, head_size = self.data.get_size()
        return batch, heads, length, head_size

    def nodes(self) -> Iterator[Any]:
        """What a kernel reads, in memory."""
        yield from (compat.realize_inputs(x) for x in (self.data, self.scale) if x is not None)

    def realized(self) -> States:
        """The same, in memory."""
        return States(*self.nodes())
