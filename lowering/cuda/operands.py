"""Operands as the kernels read them: pieces and exponents in Inductor's IR. May import `compat`.

Because the pieces are ordinary pointwise nodes and the exponents ordinary maxima, Inductor fuses
both into the kernel that produces the operand. The rules:

* An FP16 operand is its own piece. A BF16 one becomes one FP16 piece, an FP32 one two, after a
  power of two per row (of A) or column (of B) has put the largest element into [2^14, 2^15).
* operand = 2^exponent * (high + low) within 2^-23 of each element, and 2^-39 of the row's maximum;
  ties of the low piece go outward, as in `arithmetic.pieces`.
* A maximum is the same in any order, so tiles, splits and the number of rows leave the bits alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings, to_dtype
from torch._inductor.virtualized import V, ops

from healpass.lowering.compat import fits_descriptor, realize_inputs

#: The largest element of a scaled row lies in [2^14, 2^15): FP16 overflows at 2^16.
TOP_EXPONENT = 14
#: Maxima below 2^-112 keep this exponent: the scale stays a normal FP32 number, and the smallest
#: subnormal (2^-149) still becomes 2^-23, which FP16 holds.
LOWEST_EXPONENT = -112


@dataclass(frozen=True)
class Operand:
    """One operand of a tensor-core kernel.

    Attributes:
        high: `[(Q,) R, C]`, the first piece, or the operand as stored if `cut`.
        low: The second piece, if there is one in memory.
        exponent: `[(Q,) R]` (A) or `[(Q,) C]` (B), int32: the power of two taken out.
        pieces: 1 or 2.
        cut: The kernel cuts the stored operand into pieces itself.
    """

    high: ir.IRNode
    low: ir.IRNode | None
    exponent: ir.IRNode | None
    pieces: int
    cut: bool

    @property
    def nodes(self) -> list[ir.IRNode]:
        """What the kernel reads, in the order of the template's inputs."""
        return [node for node in (self.high, self.low, self.exponent) if node is not None]

    @property
    def planes(self) -> int:
        """16-bit tiles in shared memory per K tile; a stored FP32 tile is as large as two."""
        return 3 if self.cut and self.pieces == 2 else 2 if self.cut else self.pieces

    def is_turned(self, axis: int) -> bool:
        """Whether another dimension than `axis` is the contiguous one."""
        return self.high.get_stride()[axis] != 1

    def fits_descriptors(self) -> bool:
        """Whether tensor descriptors can fetch every plane."""
        planes = [plane for plane in (self.high, self.low) if plane is not None]
        return not self.cut and all(map(fits_descriptor, planes))


def as_stored(x: ir.TensorBox) -> Operand:
    """A 16-bit operand that the tensor core takes as it is."""
    return Operand(_real(x), None, None, pieces=1, cut=False)


def as_pieces(x: ir.TensorBox, axis: int, cut: bool) -> Operand:
    """An operand in FP16 pieces with exponents along `axis`, the dimension that is summed over.

    Args:
        x: FP16, BF16 or FP32.
        axis: Position of K in `x`.
        cut: Leave the cutting to the kernel; only the exponents are computed here. Same bits.
    """
    dtype = x.get_dtype()
    if dtype == torch.float16:
        return as_stored(x)
    pieces = 2 if dtype == torch.float32 else 1
    exponent = _exponent(x, axis)
    if cut:
        return Operand(_real(x), None, _real(exponent), pieces, cut=True)
    order = _stride_order(x)
    high = _piece(x, exponent, axis, order, low=False)
    low = _piece(x, exponent, axis, order, low=True) if pieces == 2 else None
    return Operand(high, low, _real(exponent), pieces, cut=False)


def _real(x: ir.TensorBox) -> ir.IRNode:
    return realize_inputs(x)


def _exponent(x: ir.TensorBox, axis: int) -> ir.TensorBox:
    """Power of two to take out of each row: int32, the shape of `x` without `axis`."""
    magnitude = lowerings[torch.ops.aten.abs.default](to_dtype(x, torch.float32))
    largest = lowerings[torch.ops.aten.amax.default](magnitude, [axis], False)
    load = largest.make_loader()

    def inner(index: Any) -> Any:
        bits = ops.to_dtype_bitcast(load(index), torch.int32, torch.float32)
        biased = ops.bitwise_and(
            ops.bitwise_right_shift(bits, ops.constant(23, torch.int32)),
            ops.constant(255, torch.int32),
        )
        floor = ops.constant(127 + LOWEST_EXPONENT, torch.int32)
        return ops.sub(ops.maximum(biased, floor), ops.constant(127 + TOP_EXPONENT, torch.int32))

    exponent = ir.Pointwise.create(
        device=x.get_device(), dtype=torch.int32, inner_fn=inner, ranges=largest.get_size()
    )
    exponent.realize()
    return exponent


def _piece(
    x: ir.TensorBox, exponent: ir.TensorBox, axis: int, order: list[int], *, low: bool
) -> ir.IRNode:
    """The high or the low FP16 piece of `x * 2^-exponent`, stored in the stride order of `x`."""
    load, load_exponent = to_dtype(x, torch.float32).make_loader(), exponent.make_loader()
    axis %= len(x.get_size())

    def inner(index: Any) -> Any:
        row = [position for dim, position in enumerate(index) if dim != axis]
        biased = ops.sub(ops.constant(127, torch.int32), load_exponent(row))
        bits = ops.bitwise_left_shift(biased, ops.constant(23, torch.int32))
        scaled = ops.mul(load(index), ops.to_dtype_bitcast(bits, torch.float32, torch.int32))
        # use_compute_types=False: Inductor would otherwise keep the "FP16" value in FP32
        # registers, and the low piece, the difference of the two, would vanish.
        high = ops.to_dtype(scaled, torch.float16, use_compute_types=False)
        if not low:
            return high
        rounded = ops.to_dtype(high, torch.float32, src_dtype=torch.float16)
        return ops.to_dtype(_rest(scaled, rounded), torch.float16, use_compute_types=False)

    piece = ir.Pointwise.create(
        device=x.get_device(), dtype=torch.float16, inner_fn=inner, ranges=x.get_size()
    )
    piece.realize()
    V.graph.get_buffer(piece.get_name()).freeze_layout_with_stride_order(order)
    return realize_inputs(piece)


def _rest(scaled: Any, rounded: Any) -> Any:
    """As the templates' `heal_outward_remainder`: ties go outward, and inf - inf is 0."""
    one, sign_bit = ops.constant(1, torch.int32), ops.constant(31, torch.int32)
    zero = ops.constant(0.0, torch.float32)
    bits = ops.to_dtype_bitcast(ops.sub(scaled, rounded), torch.int32, torch.float32)
    signs = ops.bitwise_xor(bits, ops.to_dtype_bitcast(scaled, torch.int32, torch.float32))
    outward = ops.bitwise_or(ops.bitwise_right_shift(signs, sign_bit), one)
    nudged = ops.to_dtype_bitcast(ops.add(bits, outward), torch.float32, torch.int32)
    return ops.where(ops.eq(scaled, rounded), zero, nudged)


def _stride_order(x: ir.TensorBox) -> list[int]:
    """Rank of each dimension's stride, smallest 0: row-major where nothing else is known."""
    strides = x.maybe_get_stride()
    if strides is None or not all(isinstance(s, int) or s.is_number for s in strides):
        return list(reversed(range(len(x.get_size()))))
    fastest_first = sorted(range(len(strides)), key=lambda dim: (int(strides[dim]), -dim))
    return [fastest_first.index(dim) for dim in range(len(strides))]
