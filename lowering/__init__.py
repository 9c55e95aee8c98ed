"""How the `heal::` operators run fast: Inductor lowerings. May import `arithmetic` and `ops`.

Installed as `healpass.lowering`. `register()` gives Inductor one lowering per operator; it looks
at the device and hands on to `cpu` (C++ code) or to `matmul` (Triton templates on CUDA). An
operator without a lowering for its device runs its own meaning, as one call from the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.ops.numerics import Numerics
from healpass.ops.pinned import DECOMPOSITIONS

#: A lowering; None as its result asks for the operator's own meaning.
Lowering = Callable[..., Any]


@cache
def register() -> None:
    """Register lowerings and decompositions with Inductor, once: for `heal::` operators only."""
    from healpass.lowering import cpu, matmul
    from torch._inductor import decomposition
    from torch._inductor.lowering import fallback_handler, register_lowering

    tables = {"cpu": cpu.LOWERINGS, "cuda": matmul.LOWERINGS}
    for operator in cpu.LOWERINGS.keys() | matmul.LOWERINGS.keys():
        by_device = {
            device: table[operator] for device, table in tables.items() if operator in table
        }
        meaning = fallback_handler(operator)
        register_lowering(operator, type_promotion_kind=None)(_by_device(by_device, meaning))
    decomposition.decompositions.update(DECOMPOSITIONS)
    decomposition.fast_random_decomps.cache_clear()  # it holds a copy of the table


def _by_device(lowerings: Mapping[str, Lowering], meaning: Lowering) -> Lowering:
    def lower(first: Any, *args: Any, **kwargs: Any) -> Any:
        # `numerics` is the one text among the arguments; what it simulates has no kernel.
        texts = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, str)]
        device: torch.device = first.get_device()
        lowering = lowerings.get(device.type) if all(map(_has_kernel, texts)) else None
        result = None if lowering is None else lowering(first, *args, **kwargs)
        return meaning(first, *args, **kwargs) if result is None else result

    return lower


def _has_kernel(numerics: str) -> bool:
    return Numerics.parse(numerics).plain
