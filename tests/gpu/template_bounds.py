"""Error bounds of the CUDA templates, for tests in the interpreter and on a GPU.

The gemm family's bound is the package's own. The decode family differs: three BF16 pieces by
truncation, no scales. Its bound, for K terms with S = |a| @ |b|, u = 2^-24 and H100's tensor core
(17 addends aligned to 25 fraction bits, result chopped to FP32; arXiv 2511.10909):

* cut: exact, but for what lies below BF16's smallest subnormal, 2^-133 of each element;
* dropped: products of pieces i + j > 2. A piece is below 2^-7 of what the pieces before it left,
  so x_2 * w_1 and x_1 * w_2 are below 2^-22 S each;
* chain of 64 products: 4 steps, each losing at most 16 * 2^-25 + 2^-23 of the magnitudes: 40 u S;
  the smaller products, at most 5 of 2^-6 S together, 5 * 40 * 2^-6 u S;
* promotion: K / 64 sums in FP32, one per chunk of K, one of the two accumulators.
"""

from __future__ import annotations

import torch
from healpass.lowering.matmul import BF16_PIECES, BLOCK_K, DECODE_ROWS, decode_chunk
from torch import Tensor

from healpass.arithmetic.bounds import matmul_bound, matmul_magnitudes

UNIT = 2.0**-24
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
        return matmul_bound("heal", max(k, 1), rule="h100", headroom=1, **names).evaluate(**sizes)
    pieces = BF16_PIECES[a.dtype], BF16_PIECES[b.dtype]
    dropped = {5: 1, 6: 2}.get(sum(pieces), 0) * DROPPED
    promotions = (-(-k // BLOCK_K) + decode_chunk(k)[1] + 1) * UNIT
    relative = CHAIN + (REST if sum(pieces) > 2 else 0.0) + dropped + promotions
    return relative * sizes["S"] + 2.0**-132 * (sizes["SA"] + sizes["SB"]) + k * 2.0**-148
