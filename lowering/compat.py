"""Everything in `lowering` that differs between torch 2.11 and 2.15. Imports torch only.

A difference belongs here only if it was seen: the comment at each function names the versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch._inductor import ir
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

__all__ = [
    "SymbolicGridFn",
    "TritonTemplate",
    "append_choice",
    "as_int",
    "ceildiv",
    "fits_descriptor",
    "fix_base",
    "is_many",
    "is_static",
    "is_true",
    "keep_apart",
    "realize_inputs",
    "select",
    "size_hint",
]


def append_choice(template: TritonTemplate, choices: list[Any], **knobs: Any) -> None:
    """Append one rendering of a template, with contraction of multiply and add pinned off.

    Args:
        template: What is rendered.
        choices: The list that the rendering is appended to.
        **knobs: What Inductor's `maybe_append_choice` takes: inputs, layout, constants of the
            kernel.

    Raises:
        NotImplementedError: Inductor refused the knobs; ours always have a rendering.
    """
    for node in knobs["input_nodes"]:
        fix_base(node)
    pinned = {"enable_fp_fusion": False}
    refusal = template.maybe_append_choice(choices, triton_meta=pinned, **knobs)
    if refusal is not None:
        raise refusal


def fix_base(node: ir.IRNode) -> None:
    """Settle the layout of what a view looks at, if `node` is one.

    Until then 2.11 gives a template the strides of that memory for those of the view, which may
    even be fewer.
    """
    base = node.data if isinstance(node, ir.ReinterpretView) else None
    if base is not None and isinstance(base.get_layout(), ir.FlexibleLayout):
        base.freeze_layout()


def select(name: str, choices: list[Any], nodes: list[Any], layout: ir.Layout) -> ir.TensorBox:
    """Let Inductor pick a choice; 2.11 returns the node, 2.13 the node and the choice.

    Args:
        name: Of the kernel, in Inductor's records of timings.
        choices: Renderings, at least one.
        nodes: Inputs of the kernel, in order.
        layout: Of its output.
    """
    result = autotune_select_algorithm(name, choices, nodes, layout)
    return result[0] if isinstance(result, tuple) else result


def keep_apart(node: ir.TensorBox) -> ir.TensorBox:
    """`node`, into whose kernel nothing is fused: a C++ template that writes its own result only.

    Args:
        node: What `select` returned.
    """
    V.graph.no_fuse_buffer_names.add(node.get_name())
    return node


def is_true(condition: Any) -> bool:
    """Decide a condition on sizes; a symbolic size gets a guard, so the answer is the true one.

    A size that no input determines (data-dependent) cannot be guarded: only what holds for every
    value counts as true then.
    """
    sizevars = V.graph.sizevars
    if sizevars.statically_known_true(condition):
        return True
    symbols = condition.free_symbols if isinstance(condition, sympy.Basic) else set()
    if any(sizevars.shape_env.is_unbacked_symint(symbol) for symbol in symbols):
        return False
    return bool(sizevars.evaluate_expr(condition)) if symbols else bool(condition)


def as_int(size: Any) -> int:
    """The value of a size, which the compiled code then is for: a guard, if it is symbolic."""
    return int(V.graph.sizevars.guard_int(size))


def is_static(size: Any) -> bool:
    """Whether a size is a known number."""
    return isinstance(size, int) or bool(getattr(size, "is_number", False))


def ceildiv(size: Any, divisor: int) -> Any:
    """ceil(size / divisor) as a size."""
    return CeilDiv(sympy.sympify(size), sympy.Integer(divisor))


def is_many(size: Any) -> bool:
    """Whether a size is known to be above one."""
    return V.graph.sizevars.statically_known_true(sympy.Gt(size, 1))


def fits_descriptor(node: ir.IRNode) -> bool:
    """Whether a tensor descriptor can describe a matrix (or batch) in memory.

    One of the last two dimensions is contiguous; all other strides, that dimension's size and the
    start are multiples of 16 bytes (CUDA driver API, cuTensorMapEncodeTiled). Inductor's own
    `can_use_tma` trusts the hints of symbolic sizes; here only what is certain counts.
    """
    known = V.graph.sizevars.statically_known_multiple_of
    *_, rows, columns = node.get_stride()
    inner = -1 if columns == 1 else -2 if rows == 1 else None
    if inner is None or node.get_name() in V.graph.unaligned_buffers:
        return False
    others = list(node.get_stride())
    del others[inner]
    counts = [*others, node.get_size()[inner], node.get_layout().offset]
    step = 16 // node.get_dtype().itemsize
    return 0 not in others and all(known(count, step) for count in counts)


def size_hint(sizes: Sequence[Any], fallback: int) -> tuple[int, ...]:
    """A typical value of each size, for tuning only: `optimization_hint` is 2.13's `size_hint`."""
    sizevars = V.graph.sizevars
    hint = getattr(sizevars, "optimization_hint", None) or getattr(sizevars, "size_hint")  # noqa: B009
    return tuple(int(hint(size, fallback=fallback)) for size in sizes)
