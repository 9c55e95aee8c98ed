"""Products with a linear layer's weight on CPU, for any number of rows. May import `ops`.

`cpu_gemm.cpp.jinja`: FP32 arithmetic on a 16-bit weight. One kernel for decode and prefill, so a
graph whose number of rows is not known (an engine's batch) reads the weight in its 16 bits, too.
Error of an output of K products: WIDTH chains of K / WIDTH fused multiply-adds, then a tree, which
is within the bound of one chain, K 2^-24 |a| |w|. A row's bits are those of any other batch on the
same processor.

`cpu_exact_gemm.cpp.jinja`: the digits of `ops.products.exact`, made in the kernel, and INT8
products of VNNI: the bits of the operators' reference. Sums of a level stay in INT32: with K up to
2^14, three pairs of 255 by 128 reach 1.6e9. One and two rows are summed in FP64 where that is
exact: integers of 24 and 16 bits, and K up to 2^14, stay below 2^53. Processors without VNNI keep
`cpu.exact`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._inductor import cpu_vec_isa, ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.utils import parallel_num_threads

from healpass.arithmetic.digits import digit_limit
from healpass.arithmetic.formats import FP32
from healpass.lowering import compat
from healpass.lowering.cpu.text import pointer, source
from healpass.lowering.expressions import aten, call, fp32, is_static
from healpass.ops.products.exact import Scheme, scheme

#: Tuning: elements of a block of activations, which stays in a core's second cache, and the rows
#: that it has at least, over which a weight is read once.
BLOCK, FEWEST_ROWS = 1 << 17, 60
#: A block's rows are a multiple of a tile's, which are 5 or 3.
ROWS = 15
#: Of exact products: a block's digits are made again for each block of rows.
EXACT_BLOCK_M, EXACT_BLOCK_N = 256, 64
#: Rows of A whose digits one task makes.
ROWS_OF_A_TASK = 8
#: Terms of an exact product, whose sums stay within INT32 and FP64.
MOST_TERMS = 1 << 14
_HALVES = {torch.float16: "at::Half", torch.bfloat16: "at::BFloat16"}
_WEIGHTS = {**_HALVES, torch.float32: "float"}


def multiply(a: Any, b: Any) -> Any | None:
    """`[M, K]` by `[K, N]`, FP32 `[M, N]`; None where the kernel has no place for it.

    Args:
        a: FP16, BF16 or FP32.
        b: FP16 or BF16, K elements side by side in memory, K and N known.
    """
    weight = _turned(b)
    if b.get_dtype() not in _HALVES or not _known(*b.get_size()) or weight.get_stride()[1] != 1:
        return None
    return _product(CpuGemm, a, weight)


def multiply_exactly(a: Any, b: Any, products: int) -> Any | None:
    """`ops.products.exact.exact_matmul`; None where `takes_exactly` says no.

    Args:
        a: As `multiply` takes it.
        b: FP16, BF16 or FP32, as `multiply` takes it.
        products: 3, 5, 6 or 8.
    """
    if not has_vnni() or not takes_exactly(*b.get_size()):
        return None
    weight = _turned(b)
    if weight.get_stride()[1] != 1:  # Inductor made it, and laid it out so
        weight = ir.ExternKernel.require_contiguous(weight)
    plan = scheme(products, b.get_dtype())
    return _product(functools.partial(CpuExactGemm, plan), a, weight)


def has_vnni() -> bool:
    """Whether the processor, and what Inductor compiles for, have AVX-512 with VNNI."""
    chosen = cpu_vec_isa.pick_vec_isa()
    return isinstance(chosen, cpu_vec_isa.VecAVX512) and bool(torch.cpu._is_vnni_supported())


def takes_exactly(terms: Any, columns: Any) -> bool:
    """Whether sizes are known, and sums of so many terms within their budgets.

    Args:
        terms: K.
        columns: N.
    """
    return _known(terms, columns) and int(terms) <= MOST_TERMS


def _known(terms: Any, columns: Any) -> bool:
    return is_static(terms) and is_static(columns) and 0 not in (int(terms), int(columns))


def _turned(b: Any) -> Any:
    """`[K, N]` as the `[N, K]` that lies in memory."""
    weight = compat.realize_inputs(call(aten.permute.default, b, [1, 0]))
    weight.freeze_layout()  # or Inductor may choose another one afterwards
    return weight


def _product(template: Any, a: Any, weight: Any) -> Any | None:
    """A template's result, FP32 `[M, N]`; None for no rows."""
    activation = ir.ExternKernel.require_contiguous(fp32(a))
    rows = activation.get_size()[0]
    if is_static(rows) and int(rows) == 0:
        return None
    columns = weight.get_size()[0]
    layout = ir.FixedLayout(weight.get_device(), torch.float32, [rows, columns])
    made = template(layout, activation, weight)
    return compat.keep_apart(compat.select(made.name, [made.generate()], made.input_nodes, layout))


class CpuGemm(CppTemplate):
    """The template with one product's operands.

    Attributes:
        text: Its file, without endings.
    """

    text = "cpu_gemm"

    def __init__(self, layout: ir.Layout, activation: Any, weight: Any) -> None:
        self.activation, self.weight = activation, weight
        name = f"heal_{self.text}"
        super().__init__(name, [activation, weight], layout, parallel_num_threads())

    def render(self, **options: Any) -> str:
        """The C++ text."""
        assert not options.get("epilogue_nodes"), "nothing is fused into it"
        kernel, (columns, terms) = options["kernel"], self.weight.get_size()
        text = self._template_from_string(source(self.text)).render(
            template=self,
            kernel=kernel,
            activation=self.activation,
            weight=self.weight,
            output=options.get("template_buffer_node") or self.output_node,
            weight_type=_WEIGHTS[self.weight.get_dtype()],
            pointer=functools.partial(pointer, kernel),
            K=int(terms),
            N=int(columns),
            **self.more(int(terms)),
        )
        return str(text)

    def more(self, terms: int) -> dict[str, Any]:
        """What else is written into the text.

        Args:
            terms: K.
        """
        return {"BLOCK_M": max(BLOCK // terms, FEWEST_ROWS) // ROWS * ROWS}


class CpuExactGemm(CpuGemm):
    """The same by digits.

    Attributes:
        plan: Which pairs of digits are multiplied.
    """

    text = "cpu_exact_gemm"

    def __init__(self, plan: Scheme, layout: ir.Layout, activation: Any, weight: Any) -> None:
        self.plan = plan
        super().__init__(layout, activation, weight)

    def more(self, terms: int) -> dict[str, Any]:  # noqa: ARG002
        """Digits and their limits.

        Args:
            terms: K: a block has as many rows for any.
        """
        left, right = digit_limit(self.plan.left), digit_limit(self.plan.right)
        return {
            "plan": self.plan,
            "BLOCK_M": EXACT_BLOCK_M,
            "BLOCK_N": EXACT_BLOCK_N,
            "left_bits": left.bit_length(),
            "left_limit": float(left),
            "right_bits": right.bit_length(),
            "right_limit": float(right),
            "min_exponent": FP32.min_exponent,
            "max_exponent": FP32.max_exponent,
            "ROWS_OF_A_TASK": ROWS_OF_A_TASK,
        }
