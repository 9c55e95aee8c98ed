"""Random words as a function of where they are used: the counter-based noise of dropout and draws.

Imports nothing of healpass. INT64 tensors hold 32-bit words, on every device alike.
"""

from __future__ import annotations

from torch import Tensor

BITS = 32
#: Numbers that a word can be.
COUNT = 1 << BITS


def mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words in INT64, 0 not fixed: an offset, then lowbias32.

    The multipliers are the best known of their kind (C. Wellons, hash-prospector: bias 0.17).
    Products wrap modulo 2^64, which leaves their low 32 bits right.
    """
    word = (word + 0x9E3779B9) & (COUNT - 1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = ((word ^ (word >> shift)) * factor) & (COUNT - 1)
    return word ^ (word >> 16)


def folded(seed: Tensor) -> Tensor:
    """A word of an INT64 seed: all of its 64 bits count.

    Args:
        seed: INT64, any shape.
    """
    return mix(mix(seed & (COUNT - 1)) ^ ((seed >> BITS) & (COUNT - 1)))
