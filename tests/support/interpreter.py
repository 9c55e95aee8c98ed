"""Runs generated Triton kernels on CPU, in Triton's interpreter, with its known faults corrected.

Faults of the interpreter (Triton 3.6, 3.7.1 and 3.9), which real GPUs do not have:

* `tl.dot` multiplies the raw bits of BF16 operands, and its order of summation depends on the
  tile: it is computed in FP64 and rounded once to FP32 (a tensor core's rounding is modelled
  elsewhere), for FP32 operands in the order of K, a rounding per term; for INT8 it is exact;
  `input_precision` is obeyed: FP32 operands are cut into the pieces of TF32 or BF16 that it names;
* a cast from FP32 to BF16 truncates: it is made to round to nearest even; other casts of BF16
  take its bits for a number: they go through FP32;
* `tl.fma` rounds twice (before 3.9): it is made to round once;
* the maximum and the minimum that ignore NaN hand it on (before 3.9): they are made to ignore it;
* arithmetic on BF16 works on bits: it is refused, so that no test passes by accident;
* a comparison of scalars, and a mask made of one, is not of NumPy's bool: it is made so;
* a number that bounds a loop is not a number for NumPy 2.4 (in 3.6): it is made one;
* a call of a device function leaves `triton.language` patched for good: it is patched once, here;
* Inductor's `max2` goes element by element through Python: NumPy's maximum has the same meaning.

`run` executes a whole wrapper of Inductor: its kernels in the order of its calls, on buffers full
of NaN.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import linecache
import math
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.experimental.gluon  # noqa: F401  it must see Triton as it is, before the patches
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from triton._C.libtriton import ir
from triton.language import standard
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from tests.support.fake_cuda import Kernel, always, kernels

_Builder = interpreter.InterpreterBuilder
_cast, _fp_to_fp, _binary, _masked_load, _masked_store = (
    _Builder.cast_impl,
    _Builder.create_fp_to_fp,
    _Builder.binary_op,
    _Builder.create_masked_load,
    _Builder.create_masked_store,
)
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int8, torch.int32, torch.int64, torch.bool),
)
#: `input_precision` -> significant bits and number of the pieces of an FP32 operand.
_PIECES = {
    ir.INPUT_PRECISION.TF32: (11, 1),
    ir.INPUT_PRECISION.TF32x3: (11, 2),
    ir.INPUT_PRECISION.BF16x6: (8, 3),
}
_COMPARISONS = (
    *(np.less, np.less_equal, np.greater),
    *(np.greater_equal, np.equal, np.not_equal),
)
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _values(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data.astype(np.float64)
    bits = handle.data.astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).astype(np.float64)


def _chain(a: Any, b: Any, accumulator: Any) -> Any:
    """FP32 operands: one chain of multiply-adds in the order of K, as the compiler writes it."""
    total = accumulator.data
    for column, row in zip(_values(a).T, _values(b), strict=True):
        total = (column[:, None] * row[None, :] + total).astype(np.float32)
    return interpreter.TensorHandle(total, tl.float32)


def _pieces(values: Any, bits: int, count: int) -> list[Any]:
    """Numbers of so many significant bits whose sum is near `values`, the largest first."""
    pieces = []
    for _ in range(count):
        mantissa, exponent = np.frexp(values)
        pieces.append(np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits))
        values = values - pieces[-1]
    return pieces


def _emulated(a: Any, b: Any, accumulator: Any, bits: int, count: int) -> Any:
    """FP32 operands in pieces; of their products the 1, 3 or 6 largest are kept."""
    total = _values(accumulator)
    for i, left in enumerate(_pieces(_values(a), bits, count)):
        for right in _pieces(_values(b), bits, count)[: count - i]:
            total = total + left @ right
    return interpreter.TensorHandle(total.astype(np.float32), tl.float32)


def _dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, *_rest: Any) -> Any:
    if a.dtype.scalar == tl.float32:
        if precision in _PIECES:
            return _emulated(a, b, accumulator, *_PIECES[precision])
        return _chain(a, b, accumulator)
    total = _values(a) @ _values(b) + _values(accumulator)
    result = tl.int32 if accumulator.dtype.scalar == tl.int32 else tl.float32
    kind = np.int32 if result == tl.int32 else np.float32
    return interpreter.TensorHandle(total.astype(kind), result)


def _to_bf16(source: Any) -> Any:
    tensor = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
    bits = tensor.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape)
    return interpreter.TensorHandle(bits, tl.bfloat16)


def _rounding_cast(self: Any, source: Any, target: Any) -> Any:
    if target.scalar == source.dtype.scalar:
        return _cast(self, source, target)
    if source.dtype.scalar == tl.bfloat16:
        # Every number of BF16 is one of FP32.
        source = interpreter.TensorHandle(_values(source).astype(np.float32), tl.float32)
    if target.scalar == tl.bfloat16:
        return _to_bf16(_cast(self, source, tl.float32))
    return _cast(self, source, target)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z in FP32, rounded once: the product is exact in FP64, the sum rounded to odd."""
    if z.dtype.scalar != tl.float32:
        raise TypeError("the interpreter rounds a multiply-add twice, except for FP32 operands")
    product, addend = _values(x) * _values(y), _values(z)
    total = np.asarray(product + addend)
    # Knuth's TwoSum: total + error is the exact sum.
    back = total - product
    error = (product - (total - back)) + (addend - back)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    odd = np.where(inexact, np.nextafter(total, toward), total)
    return interpreter.TensorHandle(odd.astype(np.float32), tl.float32)


def _ignoring_nan(ufunc: Any) -> Any:
    return lambda self, left, right: self.binary_op(left, right, ufunc)


def _rounding_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        return _to_bf16(source)
    return _fp_to_fp(self, source, target, rounding)


def _no_bf16_arithmetic(self: Any, left: Any, right: Any, op: Any, *rest: Any) -> Any:
    if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar) and op not in _BITWISE:
        raise TypeError("the interpreter computes on the bits of BF16: upcast first")
    result = _binary(self, left, right, op, *rest)
    return _boolean(result) if op in _COMPARISONS else result


def _boolean(mask: Any) -> Any:
    # Before Triton 3.9 the mask of a tensor descriptor is a bare array.
    values = mask if isinstance(mask, np.ndarray) else mask.data
    return interpreter.TensorHandle(values.astype(np.bool_), tl.int1)


def _load_where(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    return _masked_load(self, pointers, _boolean(mask), *rest, **named)


def _store_where(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    return _masked_store(self, pointers, value, _boolean(mask), *rest, **named)


def _maximum(x: Any, axis: int) -> Any:
    """Maximum along an axis; NaN if there is one, as Inductor's `max2`."""
    handle = interpreter.TensorHandle(np.max(x.handle.data, axis=axis), x.dtype)
    return tl.tensor(handle, tl.block_type(x.dtype, list(handle.data.shape)))


def _index(self: Any) -> int:
    return int(self.handle.data.item())


def _interpreted_functions(module: Any) -> dict[str, Any]:
    """Every compiled function of a module, to be interpreted instead."""
    return {
        name: interpreter.InterpretedFunction(value.fn)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    }


@contextlib.contextmanager
def corrected() -> Iterator[None]:
    """Triton's interpreter with its faults corrected, for the time of a block."""
    changes = {
        "create_dot": _dot,
        "cast_impl": _rounding_cast,
        "create_fp_to_fp": _rounding_fp_to_fp,
        "create_fma": _fma,
        "create_minnumf": _ignoring_nan(np.fmin),
        "create_maxnumf": _ignoring_nan(np.fmax),
        "binary_op": _no_bf16_arithmetic,
        "create_masked_load": _load_where,
        "create_masked_store": _store_where,
    }
    names = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    kept = types.SimpleNamespace(restore=always(None))
    with contextlib.ExitStack() as stack:
        stack.callback(interpreter._patch_lang(names).restore)
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang", always(kept)))
        stack.enter_context(mock.patch.object(tl.tensor, "__index__", _index))
        # NumPy warns of NaN and overflow in elements that a kernel masks off.
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(mock.patch.multiple(_Builder, **changes))
        builder = interpreter.interpreter_builder
        allowed = ("ieee", "tf32", "tf32x3", "bf16x6")
        options = dataclasses.replace(builder.options, allowed_dot_input_precisions=allowed)
        stack.enter_context(mock.patch.object(builder, "options", options))
        for module in (tl, standard, triton_helpers):
            # Triton was imported to compile: its own library functions are compiled ones, too.
            stack.enter_context(mock.patch.multiple(module, **_interpreted_functions(module)))
        yield


@contextlib.contextmanager
def interpreted(kernel: JITFunction) -> Iterator[Any]:
    """A kernel that was written by hand, to be launched on CPU tensors for the time of a block."""
    with corrected():
        yield interpreter.InterpretedFunction(kernel.fn)


class _Helpers:
    """Inductor's helper functions, with a fast maximum."""

    max2 = staticmethod(_maximum)

    def __getattr__(self, name: str) -> Any:
        return getattr(triton_helpers, name)


def _nearbyint(x: Any) -> Any:
    """The nearest whole number, ties to even, as libdevice's."""
    return tl.tensor(interpreter.TensorHandle(np.rint(x.handle.data), x.dtype), x.type)


def _is(predicate: Any) -> Any:
    def test(x: Any) -> Any:
        return tl.tensor(
            interpreter.TensorHandle(predicate(x.handle.data), tl.int1),
            x.type.with_element_ty(tl.int1),
        )

    return staticmethod(test)


class _Math:
    """libdevice and tl_math: the functions of `tl` and `tl.math` by the same names."""

    nearbyint = staticmethod(_nearbyint)
    isnan, isinf = _is(np.isnan), _is(np.isinf)

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name, None) or getattr(tl.math, name)


def load(kernel: Kernel) -> Any:
    """A generated kernel as an interpreted function: launch it as `load(kernel)[grid](...)`."""
    name = f"<interpreted {kernel.name} {hash(kernel.source)}>"
    # The interpreter rewrites functions from their source, which it asks of linecache.
    linecache.cache[name] = (len(kernel.body), None, kernel.body.splitlines(keepends=True), name)
    module: dict[str, Any] = {
        "triton": types.SimpleNamespace(jit=interpreter.InterpretedFunction, language=tl),
        "tl": tl,
        "tl_math": _Math(),
        "libdevice": _Math(),
        "triton_helpers": _Helpers(),
    }
    exec(compile(kernel.body, name, "exec"), module)
    return module[kernel.name]


@dataclass(frozen=True)
class _Launch:
    """Stands where a wrapper has a compiled kernel."""

    kernel: Kernel

    #: Tuning of Inductor's own kernels; a loop over the reduction shorter than the tests' rows,
    #: and few programs of pointwise ones, because a program costs milliseconds here.
    BLOCKS = {"XBLOCK": 16, "YBLOCK": 16, "R0_BLOCK": 64}

    def run(self, *arguments: Any, stream: Any) -> None:  # noqa: ARG002  the wrapper passes it
        """Launch with the wrapper's arguments, which end with the grid for a template."""
        function = load(self.kernel)
        names = function.arg_names
        if self.kernel.is_template:
            values, grid = arguments[: len(names)], arguments[len(names) :]
            function[tuple(int(size) for size in grid)](*values)
            return
        wide = {"XBLOCK": 512} if "_poi_" in self.kernel.name else {}
        blocks = {name: size for name, size in (self.BLOCKS | wide).items() if name in names}
        sizes = dict(zip(names, arguments, strict=False))
        grid = [
            -(-int(sizes[f"{axis}numel"]) // blocks[f"{axis.upper()}BLOCK"])
            for axis in ("x", "y")
            if f"{axis.upper()}BLOCK" in blocks
        ]
        function[tuple(grid)](*arguments, **blocks)


def _poisoned(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A buffer in which whatever is not written shows: NaN, the largest integer, or True."""
    poison = math.nan if dtype.is_floating_point else True
    if dtype != torch.bool and not dtype.is_floating_point:
        poison = torch.iinfo(dtype).max
    return torch.empty_strided(size, stride, dtype=dtype).fill_(poison)


def run(source: str, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """Execute a wrapper of Inductor on CPU tensors.

    Args:
        source: What `fake_cuda.generated_source` returned.
        *inputs: In the order of the compiled function; a symbolic size goes first.
    """
    guard = types.SimpleNamespace(
        _DeviceGuard=always(contextlib.nullcontext()), set_device=always(None)
    )
    names: dict[str, Any] = {
        "torch": types.SimpleNamespace(
            cuda=guard, ops=torch.ops, **{str(d)[6:]: d for d in _DTYPES}
        ),
        "aten": torch.ops.aten,
        "empty_strided_cuda": _poisoned,
        "reinterpret_tensor": torch._C._dynamo.guards._reinterpret_tensor,
        "get_raw_stream": always(None),
        "assert_size_stride": always(None),
        "assert_size_stride_grouped": always(None),  # from torch 2.15 on
        "assert_alignment": always(None),
        "copy_if_misaligned": lambda tensor: tensor,
        **{kernel.name: _Launch(kernel) for kernel in kernels(source)},
    }
    tree = ast.parse(source)
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    exec(compile(ast.Module([call], []), "<wrapper>", "exec"), names)
    with corrected():
        return names["call"](None, list(inputs))
