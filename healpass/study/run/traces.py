"""What an operation computed, in a few numbers that travel from machine to machine.

Layer: study. Imports nothing of healpass.

A value of any size becomes its SHA-256, its norm and 64 sums: each element, with a random sign of
its position, is added to the sum at its position modulo 64. Such a sketch is linear and keeps
distances: E ||sketch(a) - sketch(b)||^2 = ||a - b||^2, with a relative standard deviation of at
most sqrt(2/64) = 18% (Charikar, Chen and Farach-Colton 2002; Thorup and Zhang 2012). So two
machines' relative deviation follows from two small files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BUCKETS = 64


@dataclass(frozen=True)
class Sketch:
    """One operation's value.

    Attributes:
        digest: The first 16 hexadecimal digits of the SHA-256 of its bytes.
        norm: ||value||, what is not finite left out.
        sums: The 64 signed sums.
    """

    digest: str
    norm: float
    sums: tuple[float, ...]

    @classmethod
    def of(cls, value: Tensor) -> Sketch:
        """Sketch a tensor of any shape."""
        content = value.detach().cpu().reshape(-1).contiguous()
        digest = hashlib.sha256(content.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        flat = content.double().nan_to_num(0.0, 0.0, 0.0)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, flat.shape, generator=generator, dtype=torch.int8) * 2.0 - 1.0
        signed = torch.nn.functional.pad(flat * signs, (0, -flat.numel() % BUCKETS))
        sums = signed.reshape(-1, BUCKETS).sum(0)
        return cls(digest, float(flat.norm()), tuple(sums.tolist()))

    def deviation(self, other: Sketch) -> float:
        """The estimated ||other - self|| / ||self||; 0 where the digests agree."""
        if self.digest == other.digest:
            return 0.0
        gap = math.dist(self.sums, other.sums)
        return gap / self.norm if self.norm > 0 else math.inf if gap else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sketch:
        """Read what `to_dict` gave."""
        return cls(values["digest"], float(values["norm"]), tuple(map(float, values["sums"])))


def trace_of(values: Mapping[str, Tensor]) -> dict[str, Sketch]:
    """Sketch the value of every operation."""
    return {name: Sketch.of(value) for name, value in values.items()}
