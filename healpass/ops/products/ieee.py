"""FP32 matrix products without TF32 or BF16 shortcuts, whatever torch's global flags say.

`torch.set_float32_matmul_precision("high")` and its relatives let `torch.mm` on FP32 operands drop
to TF32 or BF16 inside. An operator that promises FP32 arithmetic must not obey: it pins the flags
for the time of the call and puts them back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: Precisions that leave FP32 operands alone ("none" means: no override, which is IEEE for matmul).
FULL = ("ieee", "none")


def matmul_flags(device_type: str) -> Any:
    """Return torch's precision switch for FP32 matmuls on `device_type` ("cpu" or "cuda")."""
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return backend.matmul


def is_ieee(device_type: str) -> bool:
    """Whether a plain `torch.mm` of FP32 operands is a true FP32 product on this device now."""
    return getattr(matmul_flags(device_type), "fp32_precision", "ieee") in FULL


@contextlib.contextmanager
def ieee_fp32(device_type: str) -> Iterator[None]:
    """Run a block with FP32 matmuls in IEEE FP32 on `device_type`, and without autocast."""
    flags = matmul_flags(device_type)
    before = getattr(flags, "fp32_precision", "ieee")
    lowered = before not in FULL
    if lowered:
        flags.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if lowered:
            flags.fp32_precision = before


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices `[M, K]`, `[K, N]` or batches of them, upcast to FP32, in IEEE FP32.

    |result - a @ b| <= K * 2^-24 * (|a| @ |b|) to first order, for any order of summation (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.5).
    """
    with ieee_fp32(a.device.type):
        return torch.matmul(a.to(torch.float32), b.to(torch.float32))
