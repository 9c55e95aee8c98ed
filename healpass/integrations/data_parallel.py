"""Gradients with the same bits on 1, 2 or 4 ranks. Layer `integrations`: imports `ops`.

A batch is cut into micro-batches once; how many ranks share them must not show. With
`precision="exact"` the gradient of one micro-batch has one value; what is left is their sum, which
in floating point depends on who adds first. Here each row of a gradient gets a scale (the maximum
over all micro-batches of all ranks), integers are summed over both, and the mean is rounded once:

    gradients = ExactGradients(model.parameters(), micro_batches=4)
    for batch in my_micro_batches:             # this rank's share of the four
        loss(model, batch).backward()
        gradients.take()                       # keeps the gradients, clears them
    gradients.reduce(group)                    # every rank: parameter.grad is the mean of all four
    optimizer.step()

Do not wrap the model in DistributedDataParallel: it adds in floating point. The optimizer's own
arithmetic is elementwise, and so the same on every rank; whether it is the same on another device
is not promised here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.errors import OperandError

heal = torch.ops.heal


class ExactGradients:
    """The mean of the gradients of a fixed number of micro-batches, spread over ranks in any way.

    It holds the gradients of this rank's micro-batches until `reduce`: the scale must be known
    before anything is added.

    Args:
        parameters: The trained parameters; those without a gradient count as zero.
        micro_batches: How many there are on all ranks together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], micro_batches: int) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.micro_batches = micro_batches
        self._taken: list[list[Tensor]] = []

    def take(self) -> None:
        """Take over what the `backward` of a micro-batch has left in the parameters."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self._taken.append([grad.detach() for grad in grads])
        for parameter in self.parameters:
            parameter.grad = None

    def reduce(self, group: Any = None) -> None:
        """Set every parameter's gradient to the mean over all micro-batches of all ranks.

        Args:
            group: A process group; None where this process has all micro-batches.

        Raises:
            ValueError: The ranks have taken another number of micro-batches than there are.
        """
        self._check_count(group)
        for index, parameter in enumerate(self.parameters):
            grads = [_rows(taken[index]) for taken in self._taken]
            mean = _mean(_rows(parameter), grads, self.micro_batches, group)
            parameter.grad = mean.reshape(parameter.shape).to(parameter.dtype)
        self._taken = []

    def _check_count(self, group: Any) -> None:
        found = torch.tensor(len(self._taken), dtype=torch.int64)
        _all_reduce(found, "SUM", group)
        if int(found) != self.micro_batches:
            raise OperandError(
                f"ExactGradients was made for {self.micro_batches} micro-batches, and the ranks "
                f"have taken {int(found)}.\nCall take() after the backward of each; the cut into "
                "micro-batches decides the bits, so it must be the same for every number of ranks."
            )


def _mean(like: Tensor, grads: list[Tensor], count: int, group: Any) -> Tensor:
    scale = heal.sum_scale(torch.zeros_like(like))
    for grad in grads:
        scale = torch.maximum(scale, heal.sum_scale(grad))
    _all_reduce(scale, "MAX", group)
    total = torch.zeros_like(like, dtype=torch.int64)
    for grad in grads:
        total += heal.sum_partial(grad, scale)
    _all_reduce(total, "SUM", group)
    mean: Tensor = heal.sum_total(total, scale, float(count))
    return mean


def _rows(x: Tensor) -> Tensor:
    """A matrix or more as it is, a vector or a number as one row."""
    return x.detach().reshape(1, -1) if x.dim() < 2 else x.detach()


def _all_reduce(x: Tensor, operation: str, group: Any) -> None:
    if group is not None:
        dist.all_reduce(x, getattr(dist.ReduceOp, operation), group)
