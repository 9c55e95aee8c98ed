"""How each GPU generation adds, as data. Layer `tensorcore`: may import `arithmetic`.

A tensor core adds a group of exact products and the accumulator in one step: it aligns them to the
largest exponent, keeps F bits of fraction, truncates, adds exactly, and rounds the sum toward zero
to FP32. Groups of one instruction are chained.

Sources: MMA-Sim (arXiv 2511.10909, and its code's tables of group lengths and fraction bits), FTTN
(arXiv 2403.00232), Fasi, Higham, Mikaitis and Pranesh 2021 (PeerJ CS 7:e330). The rules describe
published black-box tests; they are a model, not silicon.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

#: Products of one MMA instruction (k16); shorter groups of a generation are chained inside it.
INSTRUCTION_K = 16


@dataclass(frozen=True)
class AccumulationRule:
    """How one kind of hardware adds products of one dot product.

    Attributes:
        name: As in `simulate=`.
        kind: `truncate` is a tensor core; `fma` a chain of FP32 fused multiply-adds, rounded to
            nearest, as sgemm's inner loop; `exact` adds in FP64 and rounds once at the end.
        group: L, the number of products that one step adds.
        fraction_bits: F, the bits kept after alignment to the largest exponent.
    """

    name: str
    kind: Literal["truncate", "fma", "exact"]
    group: int = 1
    fraction_bits: int = 0


V100 = AccumulationRule("v100", "truncate", group=4, fraction_bits=23)
A100 = AccumulationRule("a100", "truncate", group=8, fraction_bits=24)
H100 = AccumulationRule("h100", "truncate", group=16, fraction_bits=25)
B200 = AccumulationRule("b200", "truncate", group=16, fraction_bits=25)
SGEMM = AccumulationRule("sgemm", "fma")
EXACT = AccumulationRule("exact", "exact")

#: By name. Ada adds as A100 does, H200 as H100.
RULES: dict[str, AccumulationRule] = {
    **{rule.name: rule for rule in (V100, A100, H100, B200, SGEMM, EXACT)},
    "ada": A100,
    "h200": H100,
}


@dataclass(frozen=True)
class Schedule:
    """In which order a kernel visits K, and when it adds its accumulator to an FP32 register.

    Attributes:
        tile_k: K of one tile, a multiple of 16. Within a tile all products of one pair of pieces
            come
            before those of the next pair.
        promote_every: K between promotions, a multiple of `tile_k`; None promotes only at the end.
        order: Seed of the order of the tiles; 0 is the natural order.
        split_k: Number of contiguous parts of K that are summed apart, then added in FP32 in
            order.

    Raises:
        ValueError: A length is not what it must be a multiple of.
    """

    tile_k: int = 64
    promote_every: int | None = 64
    order: int = 0
    split_k: int = 1

    def __post_init__(self) -> None:
        """Check that tiles are whole instructions and promotions whole tiles."""
        if self.tile_k <= 0 or self.tile_k % INSTRUCTION_K:
            raise ValueError(
                f"tile_k={self.tile_k} must be a positive multiple of {INSTRUCTION_K}, the K of "
                "one MMA instruction."
            )
        if self.promote_every is not None and (
            self.promote_every <= 0 or self.promote_every % self.tile_k
        ):
            raise ValueError(
                f"promote_every={self.promote_every} must be a positive multiple of "
                f"tile_k={self.tile_k}: a kernel promotes between tiles."
            )
        if self.split_k < 1:
            raise ValueError(f"split_k={self.split_k} must be at least 1.")

    def splits(self, k: int) -> list[list[list[range]]]:
        """Splits of promotion blocks of tiles; each tile is its range of K, clipped to `k`."""
        tiles = [range(s, min(s + self.tile_k, k)) for s in range(0, k, self.tile_k)]
        size = max(1, -(-len(tiles) // self.split_k))
        parts = [tiles[i : i + size] for i in range(0, len(tiles), size)]
        if self.order:
            for part in parts:
                random.Random(self.order).shuffle(part)
        per_block = self.promote_every // self.tile_k if self.promote_every else max(1, len(tiles))
        return [
            [part[i : i + per_block] for i in range(0, len(part), per_block)] for part in parts
        ]
