"""Attention on CPU as one C++ kernel: `templates/cpu_attention.cpp.jinja`. May import `ops`.

It reads digits, or states as stored, a block of keys at a time, takes all of `Scoring`, and skips
the blocks that a mask, causality or a window hides. Memory: a few blocks per thread, and for few
rows the parts of their chunks. It is FP32 arithmetic: `arithmetic.attention_bounds` bounds it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.utils import parallel_num_threads

from healpass.arithmetic.digits import BASE_BITS
from healpass.lowering import compat
from healpass.lowering.cpu.flash import attend_one
from healpass.lowering.cpu.text import pointer, source
from healpass.lowering.expressions import aten, call, is_static
from healpass.lowering.states import States
from healpass.ops.attention.scoring import Scoring

#: Rows and keys of a block. Tuning: 96 KiB of scores.
BLOCK_M, BLOCK_N = 192, 128
#: With at most so many rows per key head, keys are cut into chunks of so many for the threads.
FEW_ROWS, CHUNK = 64, 1024


def lower_attention(query: Any, key: Any, value: Any, *rest: Any) -> tuple[Any, Any] | None:
    """`heal::attention` on CPU; None where its reference implementation shall run.

    Args:
        query: FP16, BF16 or FP32 `[B, H, L, E]`; H is a multiple of Hkv.
        key: `[B, Hkv, S, E]`, any of those.
        value: `[B, Hkv, S, Ev]`, any of those.
        *rest: What `Scoring.read` takes, then `numerics`.
    """
    scoring = Scoring.read(*rest[:-1])
    one = attend_one(query, key, value, scoring)
    return attend(States(query), States(key), States(value), scoring) if one is None else one


def lower_integer_attention(*args: Any) -> tuple[Any, Any] | None:
    """`heal::integer_attention` on CPU; None where its reference implementation shall run."""
    query, key, value = (States(*args[i : i + 2]) for i in (0, 2, 4))
    return attend(query, key, value, Scoring.read(*args[6:-1]))


def attend(query: States, key: States, value: States, scoring: Scoring) -> tuple[Any, Any] | None:
    """Output `[B, H, L, Ev]` and logsumexp `[B, H, L]`; None for a single row, or none.

    Args:
        query: Digits, or states as stored, of size `[B, H, L, E]`; H is a multiple of Hkv.
        key: The same, `[B, Hkv, S, E]`.
        value: The same, `[B, Hkv, S, Ev]`.
        scoring: All else that decides a weight; its tensors are Inductor's.
    """
    lead, size = list(query.size[:3]), value.size[-1]
    if any(is_static(s) and int(s) == 0 for s in (*lead, size, *key.size)):
        return None
    if all(is_static(s) and int(s) == 1 for s in lead):
        return None  # what reads a single row, Inductor would fuse into a kernel that cannot
    layout = ir.FixedLayout(query.data.get_device(), torch.float32, [*lead, size + 1])
    operands = (query.realized(), key.realized(), value.realized())
    template = CpuAttention(layout, operands, _realized(scoring, [*lead, key.size[2]]))
    choices, nodes = [template.generate()], template.input_nodes
    packed = compat.select("heal_cpu_attention", choices, nodes, layout)
    output = call(aten.slice.Tensor, packed, 3, 1, size + 1)
    return output, call(aten.select.int, packed, 3, 0)


def _realized(scoring: Scoring, size: list[Any]) -> Scoring:
    """Tensors in memory, the mask as `[B, H, L, S]` with the stride 0 where it broadcasts."""
    mask: Any = scoring.attn_mask
    if mask is not None:
        mask.realize()
        mask = call(aten.expand.default, mask, size)
    mask, sinks, seed = (
        None if x is None else compat.realize_inputs(x)
        for x in (mask, scoring.sinks, scoring.seed)
    )
    window = None if scoring.window is None else compat.as_int(scoring.window)
    return replace(scoring, attn_mask=mask, sinks=sinks, seed=seed, window=window)


class CpuAttention(CppTemplate):
    """The template with one attention's operands."""

    def __init__(self, layout: ir.Layout, operands: tuple[States, ...], scoring: Scoring) -> None:
        self.operands, self.scoring = operands, scoring
        query, key, value = operands
        named = {
            "Q": query.data, "Q_SCALE": query.scale, "K": key.data, "K_SCALE": key.scale,
            "V": value.data, "V_SCALE": value.scale, "MASK": scoring.attn_mask,
            "SINKS": scoring.sinks, "SEED": scoring.seed if scoring.dropout_p else None,
        }  # fmt: skip
        self.inputs = {name: node for name, node in named.items() if node is not None}
        super().__init__(
            "heal_cpu_attention", list(self.inputs.values()), layout, parallel_num_threads()
        )

    def render(self, **options: Any) -> str:
        """The C++ text."""
        assert not options.get("epilogue_nodes"), "what reads the result reads other places"
        kernel, scoring = options["kernel"], self.scoring
        query, key, value = self.operands
        mask_is_bool = "MASK" in self.inputs and self.inputs["MASK"].get_dtype() == torch.bool
        dropped = min(math.floor(scoring.dropout_p * 2**32), 2**32 - 1)
        text = self._template_from_string(source("cpu_attention")).render(
            products=source("cpu_products"),
            template=self,
            kernel=kernel,
            inputs=self.inputs,
            output=options.get("template_buffer_node") or self.output_node,
            query=query,
            key=key,
            value=value,
            digits=query.digits,
            scoring=scoring,
            mask_is_bool=mask_is_bool,
            pointer=functools.partial(pointer, kernel),
            element=functools.partial(_element, kernel),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            CHUNK=CHUNK,
            FEW_ROWS=FEW_ROWS,
            DROPPED=f"{dropped}u",
            KEPT=1 / (1 - scoring.dropout_p) if scoring.dropout_p < 1 else 0.0,
        )
        return str(text)


def _element(kernel: Any, at: str, states: States) -> str:
    """Element `e` of the row at `at` in FP32: an integer, if it is one of digits."""
    place = f"{at}[e * {kernel.stride(states.data, -1)}"
    if not states.digits:
        return f"static_cast<float>({place}])"
    plane = kernel.stride(states.data, 2)
    digits = [f"static_cast<float>({place} + {i} * {plane}])" for i in range(states.digits)]
    return f"({' + '.join(f'{2.0 ** (BASE_BITS * i)}f * {x}' for i, x in enumerate(digits))})"


LOWERINGS = {
    torch.ops.heal.attention.default: lower_attention,
    torch.ops.heal.integer_attention.default: lower_integer_attention,
}
