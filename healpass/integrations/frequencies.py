"""Frequencies of rotary embeddings, with the same bits on every machine.

Layer: integrations. Imports `errors` and `ops`.

A model computes them when it is made, outside of every graph. Torch's power rounds its last bit as
the vectors of the processor do, so that two machines start from two models. Here they are computed
again, by the module's own code, with the functions of `heal::` in the place of torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.errors import HealError

heal, aten = torch.ops.heal, torch.ops.aten

#: How far frequencies may lie from the pinned ones, relatively, and be the same but for rounding:
#: a power within 4 units in the last place (CUDA's, the widest that is documented) and at most
#: twelve operations after it, of half a unit each, which may double what they are given.
ROUNDING = (4 + 12 * 0.5 * 2) * 2.0**-23


def _power(base: Any, exponent: Any) -> Tensor:
    if isinstance(exponent, Tensor):
        base = base if isinstance(base, Tensor) else torch.tensor(float(base), dtype=torch.float32)
        return heal.pow(base, exponent)
    return heal.pow_scalar(base, float(exponent))


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """An outer product (`einsum`) rounds once, whatever precision torch's products may have."""
    return a * b if a.shape[-1] == 1 else aten.bmm.default(a, b)


class PinnedFunctions(TorchDispatchMode):
    """Powers, logarithms, exponentials, cosines and sines by `heal::`, for tensors on CPU."""

    PINNED: dict[Any, Callable[..., Tensor]] = {
        **dict.fromkeys((aten.pow.Scalar, aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar), _power),
        **{
            getattr(aten, name).default: getattr(heal, name).default
            for name in ("cos", "sin", "exp", "exp2", "log", "log2", "reciprocal")
        },
        aten.bmm.default: _batched,
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operator, or the pinned one in its place."""
        return self.PINNED.get(func, func)(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Pinned:
    """Frequencies of a module that were replaced.

    Attributes:
        module: A rotary embedding.
        name: Of the buffer.
        given: What stood there.
        written: What stands there now.
    """

    module: nn.Module
    name: str
    given: Tensor
    written: Tensor

    def undo(self) -> None:
        """Put back what stood there, unless the module has computed others since."""
        found = getattr(self.module, self.name)
        if torch.equal(found, self.written.to(found)):
            setattr(self.module, self.name, self.given.to(found))


def pin(model: nn.Module) -> tuple[list[Pinned], dict[str, str]]:
    """Compute the frequencies of a model's rotary embeddings again, with pinned functions.

    A rotary embedding of transformers is made of its configuration alone, so a second one has what
    the first had when it was made. Frequencies that differ from that by more than rounding are
    somebody's choice, and stay.

    Args:
        model: Any module.

    Returns:
        What was replaced, and the buffers that stay though torch's power made them, by name, each
        with the reason.
    """
    replaced, kept = [], {}
    for path, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not name.endswith("inv_freq"):
                continue
            found = _again(module, name, buffer)
            if isinstance(found, str):
                kept[f"{path}.{name}" if path else name] = found
            elif not torch.equal(found, buffer):
                replaced.append(Pinned(module, name, buffer, found))
                setattr(module, name, found)
    return replaced, kept


def _again(module: Any, name: str, buffer: Tensor) -> Tensor | str:
    """A buffer with pinned functions, where and as it was; or why that cannot be."""
    if not hasattr(module, "config"):
        return f"{type(module).__name__} has no configuration to be made of"
    if buffer.is_meta:
        return "it has no values yet"
    try:
        with torch.device("cpu"), torch.no_grad(), PinnedFunctions():
            pinned = getattr(type(module)(module.config), name)
    except (HealError, TypeError, AttributeError) as error:
        return f"{type(module).__name__}(config) does not make it: {error}".splitlines()[0]
    unit = 0.0 if buffer.dtype == torch.float32 else torch.finfo(buffer.dtype).eps
    found = pinned.to(buffer)
    if found.shape != buffer.shape or not _close(found, buffer, ROUNDING + unit):
        return "it was changed after it was made"
    return found


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.double(), b.double()
    return bool(((a - b).abs() <= tolerance * a.abs()).all())
