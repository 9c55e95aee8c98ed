"""How a bit-reproducible operator is registered: one function, three uses. Imports torch.

The function is the operator's reference implementation in eager code, and its decomposition for a
compiler, which traces it and fuses it with its neighbours. Both give the same bits, because the
function is a sequence of operations that have one right result each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload

_DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {}

#: Operator -> the traceable function that it means.
DECOMPOSITIONS: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType(_DECOMPOSITIONS)


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., Any] | None = None,
) -> OpOverload:
    """Register `heal::name`.

    Args:
        schema: `name(Tensor input, ...) -> Tensor`.
        implementation: Traceable; returns new tensors.
        fake: The same on fake tensors, by cheaper means: shapes, strides and dtypes.
        backward: `(ctx, *grads) -> gradients`, in terms of `heal::` operators and of plain torch.
        save: `(ctx, inputs, output)`, what `backward` needs.

    Returns:
        The operator, as `torch.ops.heal.name.default`.
    """
    operator = register_opaque(schema, implementation, fake, backward, save)
    _DECOMPOSITIONS[operator] = implementation
    return operator


def register_opaque(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., Any] | None = None,
) -> OpOverload:
    """Register `heal::name` that a compiler calls as it is: its reference looks at data.

    Args:
        schema: As in `register`.
        implementation: Returns new tensors.
        fake: As in `register`.
        backward: As in `register`.
        save: As in `register`.
    """
    name, rest = schema.split("(", 1)
    custom = torch.library.custom_op(
        f"heal::{name}", implementation, mutates_args=(), schema=f"({rest}"
    )
    custom.register_fake(fake)
    if backward is not None:
        custom.register_autograd(backward, setup_context=save)
    operator: OpOverload = getattr(torch.ops.heal, name).default
    return operator
