"""How the `heal::` operators run fast: Inductor lowerings. May import `arithmetic` and `ops`.

Installed as `healpass.lowering`. `register()` gives Inductor one lowering per operator; it looks
at the device and hands on to `cpu` (C++ code), to `cuda` (Triton templates), or to `quantize`
(pointwise code on either). An operator without a lowering for its device runs its reference
implementation, as one call from the code. Exact precisions are decompositions instead:
bit-reproducible operators are traced as they are, and matrix products and attention are decomposed
by `cpu.exact`, or by `cuda.exact_matmul` and `cuda.exact_attention`. Where the compile says that
operators stay whole, AOTAutograd decomposes none, and the backend does later. Operators that
engines call between graphs have kernels that stand in for them (`cpu.paged`, `cuda.paged`); an
engine that compiles no graph asks for them by `start_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.cache_key import operators_stay_whole
from healpass.ops.products.numerics import Numerics
from healpass.ops.reproducible.register import DECOMPOSITIONS

#: A lowering; None as its result asks for the operator's reference implementation.
Lowering = Callable[..., Any]


@cache
def register() -> None:
    """Register lowerings, decompositions and kernels, once: for `heal::` operators only."""
    from torch._inductor import decomposition
    from torch._inductor.lowering import fallback_handler, register_lowering

    from healpass.lowering import cpu, cuda, quantize

    modules = {
        "cpu": (cpu.products, cpu.attention, cpu.attention_gradients, quantize),
        "cuda": (
            *(cuda.matmul, cuda.attention, cuda.attention_gradients, quantize),
            *(cuda.exact_matmul, cuda.exact_attention),
        ),
    }
    tables: dict[str, dict[Any, Lowering]] = {
        device: {op: lowering for module in found for op, lowering in module.LOWERINGS.items()}
        for device, found in modules.items()
    }
    decomposed = decompositions()
    # (Inductor gives an operator that has a decomposition no fallback of its own.)
    rest = [op for op in decomposed if op not in DECOMPOSITIONS]
    with_kernels = [op for table in tables.values() for op in table]
    for operator in dict.fromkeys((*with_kernels, *rest)):
        by_device = {
            device: table[operator] for device, table in tables.items() if operator in table
        }
        exactly = {"cpu": cpu.products.EXACT_LOWERINGS.get(operator)}
        fallback = fallback_handler(operator)
        register_lowering(operator, type_promotion_kind=None)(
            _by_device(operator, by_device, exactly, fallback)
        )
    decomposition.decompositions.update({op: _unless_whole(how) for op, how in decomposed.items()})
    decomposition.fast_random_decomps.cache_clear()  # it holds a copy of the table
    for device in ("cpu", "cuda"):
        register_kernels(device)


@cache
def register_kernels(device: str) -> None:
    """Register what runs in the place of operators that are called between graphs, once.

    Args:
        device: `cpu` or `cuda`.
    """
    from healpass.lowering import cpu, cuda

    for operator, kernel in {"cpu": cpu, "cuda": cuda}[device].paged.KERNELS.items():
        operator.register_kernel(device)(kernel)


def start_kernels(device: str) -> str | None:
    """The same where nothing else is compiled; or why no kernel can be, and references stay.

    Args:
        device: `cpu` or `cuda`.
    """
    from healpass.lowering import cpu

    reason = cpu.paged.not_compiled() if device == "cpu" else None
    if reason is None:
        register_kernels(device)
    return reason


@cache
def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """What the exact operators are made of; a result NotImplemented is their reference."""
    from healpass.lowering import cpu, cuda

    decomposed = [m.DECOMPOSITIONS for m in (cpu.exact, cuda.exact_matmul, cuda.exact_attention)]
    operators = dict.fromkeys(operator for table in decomposed for operator in table)
    chosen = {op: _first([table[op] for table in decomposed if op in table]) for op in operators}
    return {**DECOMPOSITIONS, **chosen}


def _unless_whole(how: Callable[..., Any]) -> Callable[..., Any]:
    def decompose(*args: Any, **kwargs: Any) -> Any:
        return NotImplemented if operators_stay_whole() else how(*args, **kwargs)

    return decompose


def _first(choices: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """The decomposition that takes the operands: each looks at their device and sizes."""

    def decompose(*args: Any, **kwargs: Any) -> Any:
        results = (choice(*args, **kwargs) for choice in choices)
        return next((found for found in results if found is not NotImplemented), NotImplemented)

    return decompose


def _by_device(
    operator: Any,
    lowerings: Mapping[str, Lowering],
    exactly: Mapping[str, Lowering | None],
    fallback: Lowering,
) -> Lowering:
    """A lowering that looks at the device, and leaves simulated arithmetic to the fallback.

    Args:
        operator: Of `heal::`.
        lowerings: By device, `cpu` or `cuda`.
        exactly: The same for exact precisions.
        fallback: The operator's reference implementation.
    """
    names = [argument.name for argument in operator._schema.arguments]

    def lower(*args: Any, **kwargs: Any) -> Any:
        leading = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        device: torch.device = leading.get_device()
        numerics = (dict(zip(names, args, strict=False)) | kwargs).get("numerics")
        how = Numerics("heal") if numerics is None else Numerics.parse(numerics)
        table = lowerings if how.products is None else exactly
        lowering = table.get(device.type) if how.plain else None
        result = None if lowering is None else lowering(*args, **kwargs)
        return fallback(*args, **kwargs) if result is None else result

    return lower
