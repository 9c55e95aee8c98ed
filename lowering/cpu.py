"""CPU lowerings: FP32 arithmetic on 16-bit weights through Inductor's C++. May import `ops`.

Each lowering returns None where the operator's own meaning shall run instead: when torch's flags allow
FP32 matmuls to drop to BF16, only the operator itself can pin them.

Decode (few rows) is bound by reading the weight. There the product is written as a sum, which Inductor
turns into one vectorized loop that reads the weight once, in 16 bits, and upcasts in registers. With
more rows a GEMM is faster, and its operand has to be FP32 in memory for the time of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, to_dtype
from torch._inductor.virtualized import V

from healpass.ops.ieee import is_ieee

aten = torch.ops.aten

#: Up to here rows are summed one by one; above, a GEMM wins (measured; see CHANGELOG 0.1).
DECODE_ROWS = 8


def lower_mm(a: Any, b: Any, numerics: str = "heal") -> Any:
    """`heal::mm` on CPU: `[M, K]` by `[K, N]`, FP32 arithmetic, bound K * 2^-24 * (|a| @ |b|)."""
    del numerics  # heal and layercast are the same FP32 arithmetic here
    if not is_ieee("cpu"):
        return None
    rows = a.get_size()[0]
    if _is_static(rows) and 1 <= int(rows) <= DECODE_ROWS and _is_half(b):
        return _row_sums(a, b, int(rows))
    return lowerings[aten.mm.default](_fp32(a), _fp32(b))


def lower_bmm(a: Any, b: Any, numerics: str = "heal") -> Any:
    """`heal::bmm` on CPU: `[B, M, K]` by `[B, K, N]`, FP32 arithmetic."""
    del numerics
    return lowerings[aten.bmm.default](_fp32(a), _fp32(b)) if is_ieee("cpu") else None


def _row_sums(a: Any, b: Any, rows: int) -> Any:
    """One vectorized sum per row: `y[m, n] = sum_k a[m, k] * b[k, n]`."""
    a = _fp32(a)
    a.realize()  # or its producer would be computed again for every output
    weight = _fp32(lowerings[aten.permute.default](b, [1, 0]))
    sums = []
    for row in range(rows):
        products = lowerings[aten.mul.Tensor](lowerings[aten.slice.Tensor](a, 0, row, row + 1), weight)
        summed = lowerings[aten.sum.dim_IntList](products, [1])
        sums.append(lowerings[aten.unsqueeze.default](summed, 0))
    return sums[0] if rows == 1 else lowerings[aten.cat.default](sums, 0)


def lower_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    is_causal: bool,
    scale: float,
    numerics: str = "heal",
) -> Any:
    """`heal::attention` on CPU through torch's FP32 flash attention (no score matrix in memory).

    Query heads that share a key head are folded into the rows of one head, so that keys and values are
    never repeated.
    """
    del numerics
    if not is_ieee("cpu") or attn_mask is not None and _needs_meaning(attn_mask):
        return None
    return None


def _needs_meaning(attn_mask: Any) -> bool:
    return attn_mask.get_dtype() not in (torch.bool, torch.float32)


def _fp32(x: Any) -> Any:
    return to_dtype(x, torch.float32)


def _is_half(x: Any) -> bool:
    return x.get_dtype() in (torch.float16, torch.bfloat16)


def _is_static(size: Any) -> bool:
    return isinstance(size, int) or getattr(size, "is_number", False)


LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.heal.mm.default: lower_mm,
    torch.ops.heal.bmm.default: lower_bmm,
    torch.ops.heal.attention.default: lower_attention,
}
