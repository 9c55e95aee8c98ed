"""How each GPU generation adds, as data. Layer `tensorcore`: may import `arithmetic`.

A tensor core adds a group of exact products and the accumulator in one step: it aligns them to the
largest exponent, keeps F bits of fraction, truncates, adds exactly, and rounds the sum toward zero
to FP32. Groups of one instruction are chained. Zero has an exponent, too: a group is never aligned
below that of its zeros. Products of FP16 are all larger than that; those of BF16 need not be.

Sources: MMA-Sim (arXiv 2511.10909, and the tables in its code, version 2.1.1: group lengths,
fraction bits and exponents of zero), FTTN (arXiv 2403.00232), Fasi, Higham, Mikaitis and Pranesh
2021 (PeerJ CS 7:e330). The rules describe published black-box tests; they are a model, not
silicon.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from healpass.arithmetic.promotion import TILE_K, promotion_interval

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
        zero_exponent: What a zero addend, product or accumulator, counts as in the alignment. A
            subnormal accumulator that is not zero counts as FP32 stores it, 2^-126.
    """

    name: str
    kind: Literal["truncate", "fma", "exact"]
    group: int = 1
    fraction_bits: int = 0
    zero_exponent: int = 0

    @property
    def promote_every(self) -> int:
        """K of a chain: four additions of a tensor core, a tile where FP32 or FP64 adds."""
        return promotion_interval(self.group if self.kind == "truncate" else 0)


V100 = AccumulationRule("v100", "truncate", group=4, fraction_bits=23, zero_exponent=-131)
A100 = AccumulationRule("a100", "truncate", group=8, fraction_bits=24, zero_exponent=-132)
H100 = AccumulationRule("h100", "truncate", group=16, fraction_bits=25, zero_exponent=-133)
B200 = AccumulationRule("b200", "truncate", group=16, fraction_bits=25, zero_exponent=-133)
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
    """In which order a kernel visits K, and when FP32 registers take over.

    A dot is what one pair of pieces is multiplied over before the next pair comes: a tile, or a
    chain where that is shorter. The sums of chains within a tile are added to one another first.

    Attributes:
        tile_k: K of one tile, a multiple of 16.
        promote_every: K of one chain, a multiple or a divisor of `tile_k`; None is one chain over
            all of K.
        order: Seed of the order of the tiles; 0 is the natural order.
        split_k: Number of contiguous parts of K that are summed apart, then added in FP32 in
            order.

    Raises:
        ValueError: A length is not what it must be a multiple of.
    """

    tile_k: int = TILE_K
    promote_every: int | None = TILE_K
    order: int = 0
    split_k: int = 1

    def __post_init__(self) -> None:
        """Check that chains are whole instructions, and tiles and chains fill one another."""
        if self.tile_k <= 0 or self.tile_k % INSTRUCTION_K:
            raise ValueError(
                f"tile_k={self.tile_k} must be a positive multiple of {INSTRUCTION_K}, the K of "
                "one MMA instruction."
            )
        every = self.promote_every
        if every is not None and (
            every <= 0 or every % INSTRUCTION_K or (every % self.tile_k and self.tile_k % every)
        ):
            raise ValueError(
                f"promote_every={every} must be a positive multiple of tile_k={self.tile_k}, or "
                f"a divisor of it and a multiple of {INSTRUCTION_K}: a kernel promotes between "
                "tiles or equal parts of them."
            )
        if self.split_k < 1:
            raise ValueError(f"split_k={self.split_k} must be at least 1.")

    @classmethod
    def of(cls, rule: AccumulationRule | str, **changes: Any) -> Schedule:
        """Chains as long as a rule asks for.

        Args:
            rule: An accumulation rule or its name.
            **changes: Other attributes.
        """
        named = RULES[rule] if isinstance(rule, str) else rule
        return cls(**{"promote_every": named.promote_every, **changes})

    def splits(self, k: int) -> list[list[list[list[range]]]]:
        """Splits of steps of chains of dots, each dot its range of K, clipped to `k`.

        A step is what the register takes at once: the chains of a tile, or one longer chain.
        """
        tiles = [range(s, min(s + self.tile_k, k)) for s in range(0, k, self.tile_k)]
        size = max(1, -(-len(tiles) // self.split_k))
        parts = [tiles[i : i + size] for i in range(0, len(tiles), size)]
        if self.order:
            for part in parts:
                random.Random(self.order).shuffle(part)
        every = self.promote_every or max(1, len(tiles)) * self.tile_k
        if every < self.tile_k:
            return [[_chains_of(tile, every) for tile in part] for part in parts]
        length = every // self.tile_k
        return [[[part[i : i + length]] for i in range(0, len(part), length)] for part in parts]


def _chains_of(tile: range, every: int) -> list[list[range]]:
    """A tile as chains of one dot each."""
    return [[tile[i : i + every]] for i in range(0, len(tile), every)]
