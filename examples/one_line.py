"""The one line: a PyTorch module compiled with `backend="heal"`; healpass is not imported.

A BF16 network is run on a batch and on its rows one by one. In plain BF16 the two differ; with
HEAL they agree to FP32, and the error against FP64 shows what the one line buys. It needs no GPU.

    python examples/one_line.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer's feed-forward block with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[M, K]` to `[M, K]`."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def batch_difference(network: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """How much a row's result depends on the rows beside it, relative to the result's norm."""
    together = network(x).double()
    alone = torch.cat([network(row[None]).double() for row in x])
    return ((together - alone).norm() / together.norm()).item()


def error(network: Callable[[Tensor], Tensor], reference: nn.Module, x: Tensor) -> float:
    """Relative error of a network against the same weights in FP64."""
    exact = reference(x.double())
    return ((network(x).double() - exact).norm() / exact.norm()).item()


@torch.no_grad()
def main() -> None:
    """Compare plain BF16 with `backend="heal"`."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(576) for _ in range(4))).to(torch.bfloat16)
    reference = copy.deepcopy(model).double()
    x = torch.randn(64, 576, dtype=torch.bfloat16)

    healed = torch.compile(model, backend="heal", options={"outputs": "fp32"})  # the one line

    print(f"{'':6}{'error against FP64':>20}{'batch of 64 against 1':>24}")
    for name, network in (("BF16", model), ("heal", healed)):
        print(f"{name:6}{error(network, reference, x):20.1e}{batch_difference(network, x):24.1e}")


if __name__ == "__main__":
    main()
