"""Error bounds of the CUDA templates, for tests in the interpreter and on a GPU.

The gemm family's bound is the package's own, for A100: that of the newer ones is below it. The
decode family differs: three BF16 pieces by truncation, no scales. Its bound, for K terms with S =
|a| @ |b| and u = 2^-24, on tensor cores of any generation (`arithmetic.promotion`):

* cut: exact, but for what lies below BF16's smallest subnormal, 2^-133 of each element;
* dropped: products of pieces i + j > 2. A piece is below 2^-7 of what the pieces before it left,
  so x_2 * w_1 and x_1 * w_2 are below 2^-22 S each;
* chain: 4 steps, which lose at most 40 u S; the smaller products, at most five of 2^-6 S each,
  lose at most 5 * 40 * 2^-6 u S;
* promotion: at most K / 32 sums in FP32, one per chunk of K, one of the two accumulators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from healpass.arithmetic.bounds import HARDWARE, Kernel, matmul_bound, matmul_magnitudes
from healpass.lowering.cuda.matmul import BF16_PIECES, DECODE_ROWS, decode_chunk

UNIT = 2.0**-24
SHORTEST_CHAIN = HARDWARE["a100"].promote_every
CHAIN = 40 * UNIT
REST = 5 * 40 * 2.0**-6 * UNIT
DROPPED = 2.0**-22
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def template_bound(
    a: Tensor, b: Tensor, numerics: str = "heal", *, decode: bool | None = None
) -> Tensor:
    """Bound of |result - a @ b| for operands as stored, `[(Q,) M, K]` and `[(Q,) K, N]`.

    `decode` names the family (the invariant kernel has decode's arithmetic); None finds it.
    """
    k = a.shape[-1]
    if decode is None:
        decode = a.dim() == 2 and a.shape[0] <= DECODE_ROWS
    sizes = matmul_magnitudes(a, b)
    if numerics == "layercast":
        extra = decode_chunk(k)[1] if decode else 0
        bound = matmul_bound("layercast", max(k + extra, 1)).evaluate(**sizes)
        return bound + k * 2.0**-149
    if not decode:
        names = {"left": NAMES[a.dtype], "right": NAMES[b.dtype]}
        return matmul_bound(
            "heal", max(k, 1), rule="a100", kernel=Kernel(headroom=1), **names
        ).evaluate(**sizes)
    pieces = BF16_PIECES[a.dtype], BF16_PIECES[b.dtype]
    dropped = {5: 1, 6: 2}.get(sum(pieces), 0) * DROPPED
    promotions = (-(-k // SHORTEST_CHAIN) + decode_chunk(k)[1] + 1) * UNIT
    relative = CHAIN + (REST if sum(pieces) > 2 else 0.0) + dropped + promotions
    return relative * sizes["S"] + 2.0**-132 * (sizes["SA"] + sizes["SB"]) + k * 2.0**-148
