"""One attention's three operators: itself, the gradients of Q, K and V, that of a float mask.

A format of Q, K and V names its operands and reads them; `define` does the rest. May import
`blockwise`, `gradients` and `scoring`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.ops.attention.blockwise import Attends
from healpass.ops.attention.gradients import memory, sinks_gradient
from healpass.ops.attention.scoring import SCORING


@dataclass(frozen=True)
class AttentionOperators:
    """The operators of one format.

    Attributes:
        attend: `(*operands, *scoring, numerics) -> (output, logsumexp)`, FP32 `[B, H, L, Ev]` and
            `[B, H, L]`: the natural logarithm of each row's denominator.
        backward: `(grad, *call, output, logsumexp)` -> FP32 gradients of Q, K and V.
        mask_grad: The same arguments -> the gradient of a float mask, FP32 in its shape.
    """

    attend: Any
    backward: Any
    mask_grad: Any

    def gradients(
        self,
        grad: Tensor,
        call: Sequence[Any],
        results: tuple[Tensor, Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of Q, K, V, the mask and the sinks where `wanted`, else None.

        Args:
            grad: Of the output.
            call: The arguments of `attend`.
            results: What it returned.
            wanted: One per gradient.
        """
        attn_mask, sinks = call[-9], call[-8]
        found: list[Tensor | None] = [None] * 5
        if any(wanted[:3]):
            found[:3] = self.backward(grad, *call, *results)
        if wanted[3]:
            found[3] = self.mask_grad(grad, *call, *results).to(attn_mask.dtype)
        if wanted[4]:
            found[4] = sinks_gradient(sinks, grad, *results)
        return found


def define(name: str, operands: str, read: Callable[..., Attends]) -> AttentionOperators:
    """Register `heal::{name}`, `heal::{name}_backward` and `heal::{name}_mask_grad`.

    Args:
        name: Of the first operator.
        operands: Their part of the schema.
        read: Checks the arguments of one call and makes an attention of them.
    """
    call = f"{operands}, {SCORING}, str numerics"
    backward = f"(Tensor grad, {call}, Tensor output, Tensor logsumexp)"

    def register(suffix: str, schema: str, implementation: Any, fake: Any) -> Any:
        operator = torch.library.custom_op(
            f"heal::{name}{suffix}", implementation, mutates_args=(), schema=schema
        )
        operator.register_fake(fake)
        return operator

    def gradients(grad: Tensor, *call: Any) -> tuple[Tensor, ...]:
        return read(*call[:-2]).gradients(grad, *call[-2:])

    def mask_gradient(grad: Tensor, *call: Any) -> Tensor:
        return read(*call[:-2]).mask_gradient(grad, *call[-2:])

    def mask_memory(grad: Tensor, *call: Any) -> Tensor:  # noqa: ARG001
        mask = read(*call[:-2]).scoring.attn_mask
        assert mask is not None, "asked for the gradient of a mask"
        return torch.empty_like(mask, dtype=torch.float32)

    return AttentionOperators(
        register(
            "",
            f"({call}) -> (Tensor, Tensor)",
            lambda *call: read(*call).attend(),
            lambda *call: read(*call).results(),
        ),
        register(
            "_backward",
            f"{backward} -> (Tensor, Tensor, Tensor)",
            gradients,
            lambda _, *call: memory(read(*call[:-2])),
        ),
        register("_mask_grad", f"{backward} -> Tensor", mask_gradient, mask_memory),
    )
