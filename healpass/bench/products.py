"""Linear layers that only a GPU has: FP32 emulated by Triton, BF16 with one tile for all sizes.

Layer: bench. Imports nothing of healpass. Both are known answers to the question that HEAL
answers, so a bench on a GPU compares with them:

* `tf32x3` and `bf16x6` are `tl.dot(input_precision=...)`: FP32 operands are cut into 2 TF32 or 3
  BF16 pieces, of whose products 3 or 6 are kept. Nothing is added up outside the tensor core's
  accumulator, and a 16-bit weight is cut like any other operand.
* `invariant` is the idea of Thinking Machines ("Defeating Nondeterminism in LLM Inference", 2025):
  a BF16 product whose tile, and so the order of its sums, is one for every batch size. No program
  shares its K with another.

The symbols: activation `[M, K]`, weight `[N, K]`, all row-major.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_product(  # type: ignore[no-untyped-def]
    X, W, OUT, M, N, K, PRECISION: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One tile of `X @ W.T`: a chain of dots over the whole of K, in FP32."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    rm = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + rk
        inside_x = (rm[:, None] < M) & (k[None, :] < K)
        inside_w = (rn[None, :] < N) & (k[:, None] < K)
        x = tl.load(X + rm[:, None] * K + k[None, :], mask=inside_x, other=0.0)
        w = tl.load(W + rn[None, :] * K + k[:, None], mask=inside_w, other=0.0).to(x.dtype)
        accumulator = tl.dot(x, w, accumulator, input_precision=PRECISION)
    inside = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(OUT + rm[:, None] * N + rn[None, :], accumulator, mask=inside)


@dataclass(frozen=True)
class Product:
    """A way to multiply, and the tile that it takes.

    Attributes:
        precision: Of `tl.dot`; without meaning for 16-bit operands.
        activation: Dtype of activations and outputs.
        block_k: Of the tile; a step of K.
        follows_rows: Whether few rows get a small tile. Then the order of sums may be another one.
    """

    precision: str
    activation: torch.dtype
    block_k: int
    follows_rows: bool

    def block_m(self, rows: int) -> int:
        """Rows of a tile."""
        return 16 if self.follows_rows and rows <= 64 else 128

    def __call__(self, activation: Tensor, weight: Tensor) -> Tensor:
        """Multiply `[..., K]` by the weight `[N, K]`, giving `[..., N]` in `self.activation`."""
        n, k = weight.shape
        x = activation.reshape(-1, k).contiguous()
        out = torch.empty(x.shape[0], n, device=x.device, dtype=self.activation)
        m, block_m = x.shape[0], self.block_m(x.shape[0])
        grid = (triton.cdiv(m, block_m) * triton.cdiv(n, BLOCK_N),)
        tile_product[grid](
            x, weight.contiguous(), out, m, n, k, self.precision, block_m, BLOCK_N, self.block_k,
            num_warps=WARPS,
        )  # fmt: skip
        return out.view(*activation.shape[:-1], n)


BLOCK_N, WARPS = 128, 8
PRODUCTS = {
    "tf32x3": Product("tf32x3", torch.float32, 32, follows_rows=True),
    "bf16x6": Product("bf16x6", torch.float32, 32, follows_rows=True),
    "invariant": Product("ieee", torch.bfloat16, 64, follows_rows=False),
}
