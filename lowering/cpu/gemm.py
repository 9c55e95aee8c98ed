"""FP32 activations by a 16-bit weight on CPU, for any number of rows: `cpu_gemm.cpp.jinja`.

One kernel serves decode and prefill, so a graph whose number of rows is not known (an engine's
batch) reads the weight in its 16 bits, too. Error of an output of K products: WIDTH chains of
K / WIDTH fused multiply-adds, then a tree, which is within the bound of one chain,
K 2^-24 |a| |w|. Its bits are those of any other batch on the same processor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.utils import parallel_num_threads

from healpass.lowering import compat
from healpass.lowering.cpu.text import pointer, source
from healpass.lowering.expressions import aten, call, fp32, is_static

#: Tuning: a block's weights and activations stay in a core's second cache.
BLOCK_M, BLOCK_N = 192, 16
_HALVES = {torch.float16: "at::Half", torch.bfloat16: "at::BFloat16"}


def multiply(a: Any, b: Any) -> Any | None:
    """`[M, K]` by `[K, N]`, FP32 `[M, N]`; None where the kernel has no place for it.

    Args:
        a: FP16, BF16 or FP32.
        b: FP16 or BF16, K elements side by side in memory, K and N known.
    """
    terms, columns = b.get_size()
    sizes = (terms, columns)
    if b.get_dtype() not in _HALVES or not all(is_static(s) and int(s) > 0 for s in sizes):
        return None
    weight = compat.realize_inputs(call(aten.permute.default, b, [1, 0]))
    activation = compat.realize_inputs(fp32(a))
    if weight.get_stride()[1] != 1 or activation.get_stride()[1] != 1:
        return None
    rows = activation.get_size()[0]
    if is_static(rows) and int(rows) == 0:
        return None
    layout = ir.FixedLayout(activation.get_device(), torch.float32, [rows, columns])
    template = CpuGemm(layout, activation, weight)
    return compat.select("heal_cpu_gemm", [template.generate()], template.input_nodes, layout)


class CpuGemm(CppTemplate):
    """The template with one product's operands."""

    def __init__(self, layout: ir.Layout, activation: Any, weight: Any) -> None:
        self.activation, self.weight = activation, weight
        super().__init__("heal_cpu_gemm", [activation, weight], layout, parallel_num_threads())

    def render(self, **options: Any) -> str:
        """The C++ text."""
        assert not options.get("epilogue_nodes"), "what reads the result reads other places"
        kernel, (columns, terms) = options["kernel"], self.weight.get_size()
        text = self._template_from_string(source("cpu_gemm")).render(
            template=self,
            kernel=kernel,
            activation=self.activation,
            weight=self.weight,
            output=options.get("template_buffer_node") or self.output_node,
            half=_HALVES[self.weight.get_dtype()],
            pointer=functools.partial(pointer, kernel),
            K=int(terms),
            N=int(columns),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
        )
        return str(text)
