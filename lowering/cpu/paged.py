"""Pages on CPU: C++ kernels of `heal::paged_write` and `heal::paged_attention`. May import `ops`.

Serving engines call these operators as they are, outside of compiled graphs, with other sizes at
each step. So a kernel is compiled by Inductor's own C++ compiler and kept in its cache, for
everything but sizes, and stands in for the reference implementation on CPU (`KERNELS`).
In an exact precision it has the reference's bits. The others' weights are FP64: their error is
that of the integers, and one rounding (`arithmetic.attention_bounds` with `kv=`).

A cap or sinks in an exact precision have a kernel of their own, for they go by other steps
(`ops.attention.exact_capped`).

What a kernel does not take stays with the reference: a simulated tensor core, sums in another
order, and whatever has to be refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from healpass.arithmetic.digits import digit_limit
from healpass.arithmetic.formats import FP32
from healpass.lowering.cpu.text import source
from healpass.ops.attention import paged
from healpass.ops.attention.exact_steps import MOST_KEYS, P_BITS
from healpass.ops.attention.paged import Cell, PagedAttention
from healpass.ops.attention.quantize import FORMATS
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.exact import scheme
from healpass.ops.products.matmul import OPERAND_DTYPES
from healpass.ops.reproducible import fp64, fp64_coefficients
from healpass.ops.reproducible.reduce import ACCUMULATOR_BITS, ELEMENT_BITS

#: What the bits of a kernel depend on, as `backend.PINNED_SETTINGS` has it: no fma but those that
#: are written, nothing reassociated.
SETTINGS = {
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
}
#: Inductor writes its own vectors and tells GCC to make none; our loops over elements are plain.
VECTORIZE = ("-ftree-loop-vectorize",)
#: Keys of a block: 2^45 each with INT24, so FP64 adds their integers exactly.
BLOCK = 128
#: Tuning: rows of a tile, and how many scores of it shall stay in a core's own cache.
FEWEST_ROWS, MOST_ROWS, SCORES = 8, 96, 1 << 16
#: Of a causal tile so many rows, a few tiles of `product`, leave out what none of them sees.
SOME_ROWS = 24
FP64_BITS = 53
#: The same of the kernel with a cap or sinks, whose keys and values lie there plane by plane, and
#: are made anew for each tile: smaller blocks, and more rows of a tile.
WEIGHED_BLOCK, WEIGHED_ROWS = 64, 32
#: Terms of its products that FP64 adds exactly: each is below 2^38 (1 + 2^-7).
MOST_TERMS = 1 << 14
_C_TYPES = {torch.int32: "int32_t", torch.int64: "int64_t"}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A template, what is written into it, and the types of its arguments.

    Attributes:
        template: Name of the file without its endings.
        values: What the template asks for, by name.
        pointers: Types of the tensors.
        sizes: How many INT64 follow.
    """

    template: str
    values: dict[str, Any]
    pointers: tuple[str, ...]
    sizes: int

    def source(self) -> str:
        """The C++ text."""
        integers = _template("cpu_integers").render(self.values)
        products = _template("cpu_products").render()
        return _template(self.template).render(self.values, integers=integers, products=products)


@functools.cache
def compiled(kernel: Kernel) -> Callable[..., None]:
    """The kernel as Inductor compiles it, from its cache if it is there."""
    types = [*kernel.pointers, *["int64_t"] * kernel.sizes]
    with config.patch(SETTINGS):
        found: Callable[..., None] = CppPythonBindingsCodeCache.load_pybinding(
            types, kernel.source(), extra_flags=VECTORIZE
        )
    return found


def not_compiled() -> str | None:
    """Why no kernel can be compiled here, or None: the smallest one is."""
    try:
        compiled(_writer(Cell("int16", 1, 1)))
    except (InvalidCxxCompiler, CppCompileError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _template(name: str) -> jinja2.Template:
    return jinja2.Template(source(name), undefined=jinja2.StrictUndefined)


def _of_cell(cell: Cell) -> dict[str, Any]:
    fmt = FORMATS[cell.kv]
    sizes = {"size": cell.size, "value_size": cell.value_size}
    return {"digits": fmt.digits, "limit": float(fmt.limit)} | sizes


# ------------------------------------------------------------------------------------------ write


def write(pages: Tensor, key: Tensor, value: Tensor, slots: Tensor, kv: str) -> None:
    """`heal::paged_write` on CPU.

    Args:
        pages: As the operator takes it, and the others.
        key: `[T, Hkv, E]`.
        value: `[T, Hkv, Ev]`.
        slots: INT64 `[T]`.
        kv: `int16` or `int24`.
    """
    cell = Cell(kv, key.shape[-1], value.shape[-1])
    paged.check_pages(pages, key.shape[1], cell)
    fit = key.shape[:2] == value.shape[:2] and slots.shape == key.shape[:1]
    known = {key.dtype, value.dtype} <= set(OPERAND_DTYPES)
    if not fit or not known or 0 in (*key.shape, *value.shape) or pages.stride(-1) != 1:
        return paged.write_tokens(pages, key, value, slots, kv)
    key, value = _rows(key), _rows(value)
    fault = torch.zeros(1, dtype=torch.int64)
    run = compiled(_writer(cell))
    run(
        *(key, value, slots.to(torch.int64).contiguous(), pages, fault),
        *(len(key), key.shape[1], pages.shape[0], pages.shape[2]),
        *(*key.stride()[:2], *value.stride()[:2], *pages.stride()[:3], torch.get_num_threads()),
    )
    return paged.write_tokens(pages, key, value, slots, kv) if fault else None


@functools.cache
def _writer(cell: Cell) -> Kernel:
    pointers = ("float*", "float*", "int64_t*", "int8_t*", "int64_t*")
    return Kernel("cpu_paged_write", _of_cell(cell), pointers, 12)


def _rows(states: Tensor) -> Tensor:
    """In FP32, the elements of a row side by side."""
    states = states.to(torch.float32)
    return states if states.stride(-1) == 1 else states.contiguous()


# -------------------------------------------------------------------------------------- attention


def attend(*call: Any) -> Tensor:
    """`heal::paged_attention` on CPU.

    Args:
        *call: The arguments of the operator.
    """
    asked = PagedAttention.read(*call)
    output = _attended(asked) if _takes(asked) else None
    return asked.attend() if output is None else output


def _takes(asked: PagedAttention) -> bool:
    """Whether the kernel has a place for it."""
    scoring, how = asked.scoring, asked.how
    indices = (asked.starts, asked.lengths, asked.blocks)
    return (
        how.plain
        and asked.query.dtype in OPERAND_DTYPES
        and (scoring.sinks is None or scoring.sinks.shape == asked.query.shape[1:2])
        and (not _by_weights(asked) or _takes_by_weights(asked))
        and 0 not in (*asked.query.shape, *asked.pages.shape, asked.cell.value_size)
        and asked.pages.stride(-1) == 1
        and all(index.dtype in _C_TYPES for index in indices)
    )


def _by_weights(asked: PagedAttention) -> bool:
    """Whether the steps are those of `ops.attention.exact_capped`."""
    scoring = asked.scoring
    return asked.how.products is not None and (scoring.softcap, scoring.sinks) != (None, None)


def _takes_by_weights(asked: PagedAttention) -> bool:
    """Whether sums stay exact, and FP32 has the numbers that the reference writes into it."""
    scoring = asked.scoring
    numbers = (scoring.scale, 0.0 if scoring.softcap is None else scoring.softcap)
    return (
        asked.cell.size <= MOST_TERMS
        and all(abs(number) <= FP32.largest for number in numbers)
        and (scoring.sinks is None or scoring.sinks.dtype in OPERAND_DTYPES)
    )


def _attended(asked: PagedAttention) -> Tensor | None:
    """The output; None where a request is one to refuse, or too long."""
    query, pages, scoring = _rows(asked.query), asked.pages, asked.scoring
    starts, lengths, blocks = asked.starts.contiguous(), asked.lengths.contiguous(), asked.blocks
    blocks = blocks if blocks.stride(-1) == 1 else blocks.contiguous()
    output, fault = asked.results().zero_(), torch.zeros(1, dtype=torch.int64)
    sinks = output if scoring.sinks is None else scoring.sinks.to(torch.float32).contiguous()
    types = tuple(_C_TYPES[index.dtype] for index in (starts, lengths, blocks))
    constants, products = _constants(scoring), asked.how.products
    if _by_weights(asked):
        kernel = _weigher(asked.cell, constants, products, types)
    else:
        kernel = _attender(asked.cell, constants, products is not None, types)
    compiled(kernel)(
        *(query, pages, starts, lengths, blocks, sinks, output, fault),
        *(len(query), len(lengths), query.shape[1], pages.shape[1], pages.shape[0]),
        *(pages.shape[2], blocks.shape[1], *query.stride()[:2], *pages.stride()[:3]),
        *(blocks.stride(0), torch.get_num_threads()),
    )
    return None if fault else output


def _constants(scoring: Scoring) -> Scoring:
    """What is written into the kernel: of sinks, only that there are some."""
    return replace(scoring, sinks=None if scoring.sinks is None else _SOME)


#: Stands for sinks in the key of a kernel.
_SOME: Any = "some"


@functools.cache
def _attender(cell: Cell, scoring: Scoring, exact: bool, types: tuple[str, ...]) -> Kernel:
    fmt = FORMATS[cell.kv]
    most = min(1 << MOST_KEYS[fmt.digits], 1 << (ACCUMULATOR_BITS - ELEMENT_BITS))
    values = {
        "scoring": scoring, "exact": exact, "index": _index_types(types),
        "depth": (1 << FP64_BITS) // fmt.limit**2, "most_keys": most, "p_bits": P_BITS,
        "BLOCK": BLOCK, "FEWEST_ROWS": FEWEST_ROWS, "MOST_ROWS": MOST_ROWS, "SCORES": SCORES,
        "SOME_ROWS": SOME_ROWS,
    }  # fmt: skip
    return _attends("cpu_paged_attention", _of_cell(cell) | _functions() | values, types)


@functools.cache
def _weigher(cell: Cell, scoring: Scoring, products: int, types: tuple[str, ...]) -> Kernel:
    """The kernel of an exact precision with a cap or sinks."""
    plan = scheme(products, torch.float32)
    assert plan.left == plan.right, "Q, K and V are FP32 there"
    limit = digit_limit(plan.left)
    values = {
        "scale": scoring.scale, "softcap": scoring.softcap, "sinks": scoring.sinks is not None,
        "window": scoring.window, "is_causal": scoring.is_causal, "index": _index_types(types),
        "plan": plan, "piece_limit": float(limit), "piece_bits": limit.bit_length(),
        # A sink is one more term of the denominator.
        "most_keys": (1 << (ACCUMULATOR_BITS - ELEMENT_BITS)) - 1, "most_terms": MOST_TERMS,
        "BLOCK": WEIGHED_BLOCK, "FEWEST_ROWS": WEIGHED_ROWS, "MOST_ROWS": MOST_ROWS,
        "SCORES": SCORES,
    }  # fmt: skip
    return _attends("cpu_paged_weights", _of_cell(cell) | _functions() | values, types)


def _index_types(types: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(("starts", "lengths", "blocks"), types, strict=True))


def _functions() -> dict[str, Any]:
    """`reproducible.fp64` in C++, and the unit of a denominator."""
    constants = {
        "exp_limit": fp64.EXP_LIMIT, "inverse_ln2": 1 / math.log(2), "ln2_high": fp64.LN2_HIGH,
        "ln2_low": fp64.LN2_LOW, "expm1": fp64_coefficients.EXPM1,
    }  # fmt: skip
    return {"fp64": _template("cpu_fp64").render(constants), "element_bits": ELEMENT_BITS}


def _attends(template: str, values: dict[str, Any], types: tuple[str, ...]) -> Kernel:
    values = values | {"requests": _template("cpu_paged_requests").render(values)}
    indices = (f"{name}*" for name in types)
    pointers = ("float*", "int8_t*", *indices, "float*", "float*", "int64_t*")
    return Kernel(template, values, pointers, 14)


#: Operator -> what runs in its place on CPU.
KERNELS = {paged.paged_write: write, paged.paged_attention: attend}
