"""How long a tensor core adds on its own before FP32 takes over. Layer `arithmetic`.

A chain is what the tensor core adds into its own accumulator: B terms of K, group by group of L.
It loses at most B 2^-F by aligning and B / L 2^-23 by chopping (lemmas **align** and **chop** of
`bounds`), so what a chain may cost is a choice of B. The rule, one for all generations:

    a chain ends after four additions of each product, B = 4 L.

| generation | L  | F  | B  | align                | chop                 |
|------------|----|----|----|----------------------|----------------------|
| V100       | 4  | 23 | 16 | 16 * 2^-23 = 32 u    | 4 * 2^-23 = 8 u      |
| A100, Ada  | 8  | 24 | 32 | 32 * 2^-24 = 32 u    | 4 * 2^-23 = 8 u      |
| H100, B200 | 16 | 25 | 64 | 64 * 2^-25 = 32 u    | 4 * 2^-23 = 8 u      |

A coarser generation gets shorter chains and the same bound. (With B = 64 for all, A100 doubled it,
and where one product makes the sum it erred 1.28 times as much as torch's FP32.)

More chains are more FP32 additions, and each rounds. The chains of one tile, 64 of K, are
therefore added to one another first and only their sum to the register that holds the result, so
that this rounds once per 64 of K on every generation. (Without that, V100's 96 additions of a sum
of 1536 erred 1.6 times as much as torch's FP32.)
"""

from __future__ import annotations

#: Additions of each product in one chain.
CHAINED_ADDITIONS = 4
#: K of a tile: its chains are added to one another before the register sees them.
TILE_K = 64


def promotion_interval(group: int) -> int:
    """K of a chain on hardware that adds `group` products at once; of a tile if that is 0."""
    return CHAINED_ADDITIONS * group or TILE_K
