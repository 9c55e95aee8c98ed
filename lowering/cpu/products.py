"""CPU lowerings: FP32 arithmetic on 16-bit weights through Inductor's C++. May import `ops`.

Each lowering returns None where the operator's reference implementation shall run instead: when
torch's flags allow FP32 matmuls to drop to BF16, only the operator itself can pin them.

One row is bound by reading the weight. There the product is written as a sum, which Inductor turns
into one vectorized loop, fused with what is around it. More rows, or an unknown number of them,
are a kernel of our own (`cpu.gemm`). Both read the weight once, in its 16 bits, and widen it in
registers. A weight whose rows do not lie side by side goes through a library's GEMM, whose operand
has to be FP32 in memory for the time of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from healpass.lowering.cpu import gemm
from healpass.lowering.expressions import aten, call, fp32, is_static, mul, unsqueeze
from healpass.ops.products.ieee import is_ieee
from healpass.ops.products.numerics import Numerics


def lower_mm(a: Any, b: Any, numerics: str = "heal") -> Any:
    """`heal::mm` on CPU: `[M, K]` by `[K, N]`, FP32 arithmetic, bound K * 2^-24 * (|a| @ |b|).

    Args:
        a: FP16, BF16 or FP32.
        b: Any of those.
        numerics: `heal` and `layercast` are the same FP32 arithmetic here.
    """
    del numerics
    if not is_ieee("cpu"):
        return None
    rows = a.get_size()[0]
    if is_static(rows) and int(rows) == 1 and _is_half(b):
        return _row_sum(a, b)
    product = gemm.multiply(a, b)
    return call(aten.mm.default, fp32(a), fp32(b)) if product is None else product


def lower_exact_mm(a: Any, b: Any, numerics: str) -> Any:
    """`heal::mm` of an exact precision on CPU, with the bits of its reference implementation.

    Args:
        a: FP16, BF16 or FP32 `[M, K]`.
        b: Any of those, `[K, N]`.
        numerics: An exact precision.
    """
    products = Numerics.parse(numerics).products
    assert products is not None, "asked for an exact product"
    return gemm.multiply_exactly(a, b, products)


def lower_bmm(a: Any, b: Any, numerics: str = "heal") -> Any:
    """`heal::bmm` on CPU: `[B, M, K]` by `[B, K, N]`, FP32 arithmetic.

    Args:
        a: FP16, BF16 or FP32.
        b: Any of those.
        numerics: `heal` or `layercast`.
    """
    del numerics  # heal and layercast are the same FP32 arithmetic here
    if not is_ieee("cpu"):
        return None
    return call(aten.bmm.default, fp32(a), fp32(b))


def _row_sum(a: Any, b: Any) -> Any:
    """One vectorized sum: `y[n] = sum_k a[k] * b[k, n]`."""
    a = fp32(a)
    a.realize()  # or its producer would be computed again for every output
    weight = fp32(call(aten.permute.default, b, [1, 0]))
    return unsqueeze(call(aten.sum.dim_IntList, mul(a, weight), [1]), 0)


def _is_half(x: Any) -> bool:
    return x.get_dtype() in (torch.float16, torch.bfloat16)


LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.heal.mm.default: lower_mm,
    torch.ops.heal.bmm.default: lower_bmm,
}
EXACT_LOWERINGS: dict[Any, Callable[..., Any]] = {torch.ops.heal.mm.default: lower_exact_mm}
