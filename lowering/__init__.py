"""How the `heal::` operators run fast: Inductor lowerings. May import `arithmetic` and `ops`.

Installed as `healpass.lowering`. `register()` gives Inductor one lowering per operator; it looks at the
device and hands on to `cpu` or to the CUDA templates. An operator without a lowering for its device
runs its own meaning, as one call from the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

import healpass.ops  # noqa: F401  the operators must be registered


@cache
def register() -> None:
    """Register the lowerings with Inductor, once per process."""
    from torch._inductor.lowering import fallback_handler, register_lowering

    from healpass.lowering import cpu

    for operator, on_cpu in cpu.LOWERINGS.items():
        meaning = fallback_handler(operator)
        register_lowering(operator, type_promotion_kind=None)(_by_device(on_cpu, meaning))


def _by_device(on_cpu: Callable[..., Any], meaning: Callable[..., Any]) -> Callable[..., Any]:
    def lower(first: Any, *args: Any, **kwargs: Any) -> Any:
        device: torch.device = first.get_device()
        result = on_cpu(first, *args, **kwargs) if device.type == "cpu" else None
        return meaning(first, *args, **kwargs) if result is None else result

    return lower
