"""CPU lowerings: FP32 arithmetic on 16-bit weights through Inductor's C++. May import `ops`.

Each lowering returns None where the operator's own meaning shall run instead: when torch's flags
allow FP32 matmuls to drop to BF16, only the operator itself can pin them.

Decode (few rows) is bound by reading the weight. There the product is written as a sum, which
Inductor turns into one vectorized loop that reads the weight once, in 16 bits, and upcasts in
registers. With more rows a GEMM is faster, and its operand has to be FP32 in memory for the time
of the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.lowering import lowerings, to_dtype
from torch._inductor.virtualized import V

from healpass.ops.ieee import is_ieee

aten = torch.ops.aten

#: Up to here rows are summed one by one; above, a GEMM is used. Tuning: it decides no bound.
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
    del numerics  # heal and layercast are the same FP32 arithmetic here
    if not is_ieee("cpu"):
        return None
    return lowerings[aten.bmm.default](_fp32(a), _fp32(b))


def _row_sums(a: Any, b: Any, rows: int) -> Any:
    """One vectorized sum per row: `y[m, n] = sum_k a[m, k] * b[k, n]`."""
    a = _fp32(a)
    a.realize()  # or its producer would be computed again for every output
    weight = _fp32(lowerings[aten.permute.default](b, [1, 0]))
    sums = []
    for row in range(rows):
        products = lowerings[aten.mul.Tensor](
            lowerings[aten.slice.Tensor](a, 0, row, row + 1), weight
        )
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
    """`heal::attention` on CPU through torch's FP32 flash attention: no score matrix in memory.

    In decode, query heads that share a key head become rows of one head, so that keys and values
    are not repeated; with more queries they are repeated and causality is left to the kernel.
    """
    del numerics
    both = is_causal and attn_mask is not None  # the operator takes both, torch's kernel does not
    if both or not is_ieee("cpu") or not _fits_flash(query, key, value):
        return None
    query, key, value = map(_fp32, (query, key, value))
    batch, heads, length, size = query.get_size()
    groups = heads // key.get_size()[1]
    mask = None if attn_mask is None else _float_mask(attn_mask, query, key)
    if groups > 1 and not is_causal and _is_static(length) and int(length) == 1:
        rows = _view(query, [batch, heads // groups, groups, size])
        mask = None if mask is None else _fold_mask(mask, heads // groups, groups)
        attended = _flash(rows, key, value, False, mask, scale)
        return _view(attended, [batch, heads, length, size])
    if groups > 1:
        key, value = (_repeat_heads(states, groups) for states in (key, value))
    return _flash(query, key, value, is_causal, mask, scale)


def _flash(query: Any, key: Any, value: Any, is_causal: bool, mask: Any, scale: float) -> Any:
    kernel = lowerings[aten._scaled_dot_product_flash_attention_for_cpu.default]
    return kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]


def _fits_flash(query: Any, key: Any, value: Any) -> bool:
    """The kernel needs one head size for K and V and at least one key and one query."""
    sizes = [*query.get_size(), *key.get_size(), *value.get_size()]
    empty = any(_is_static(size) and int(size) == 0 for size in sizes)
    same = V.graph.sizevars.statically_known_equals(query.get_size()[-1], value.get_size()[-1])
    return same and not empty


def _float_mask(attn_mask: Any, query: Any, key: Any) -> Any:
    """The mask as FP32 `[B or 1, H or 1, L, S]`, -inf where a key is hidden."""
    rows, columns = query.get_size()[-2], key.get_size()[-2]
    mask = attn_mask
    if mask.get_dtype() == torch.bool:
        hidden = lowerings[aten.scalar_tensor.default](
            -math.inf, dtype=torch.float32, device="cpu"
        )
        visible = lowerings[aten.scalar_tensor.default](0.0, dtype=torch.float32, device="cpu")
        mask = lowerings[aten.where.self](mask, visible, hidden)
    lead = list(mask.get_size())[:-2]
    lead = [1] * (2 - len(lead)) + lead
    return lowerings[aten.expand.default](_fp32(mask), [*lead, rows, columns])


def _fold_mask(mask: Any, heads: Any, groups: Any) -> Any:
    """`[B, H or 1, 1, S]` to `[B, Hkv, groups, S]`, as the folded query needs it."""
    batch, _, _, columns = mask.get_size()
    full = lowerings[aten.expand.default](mask, [batch, heads * groups, 1, columns])
    return _view(full, [batch, heads, groups, columns])


def _repeat_heads(states: Any, groups: Any) -> Any:
    batch, heads, length, size = states.get_size()
    states = lowerings[aten.unsqueeze.default](states, 2)
    states = lowerings[aten.expand.default](states, [batch, heads, groups, length, size])
    return _view(states, [batch, heads * groups, length, size])


def _view(x: Any, sizes: list[Any]) -> Any:
    return lowerings[aten.reshape.default](x, sizes)


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
