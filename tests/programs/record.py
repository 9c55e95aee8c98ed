"""What a small program is, and what draws its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Program:
    """A few lines of PyTorch and how to draw their operands.

    Attributes:
        run: The program; its operands may be tensors, modules, numbers and containers of them.
        draw: Makes the operands.
        reference: Another function for FP32 and FP64, where the program itself has no meaning
            there (bits of a format) or torch's modes cannot follow it (higher-order operators).
        replay: For random programs: the same results from (results, *operands), what was drawn
            being read off the results.
        coarse: Why 16 bits inside are what healpass promises (a foreign operator).
        exact: Why plain BF16 may be as good: it moves data, or rounds its results once.
        grads: Whether operands may require gradients.
        mutates: Whether operands are written: then they are compared as well, and are no leaves.
        narrow: Operands are BF16 numbers whatever their dtype, since autocast rounds parameters.
        dtypes: Where the program has a meaning.
    """

    run: Callable[..., Any]
    draw: Callable[[Draw], tuple[Any, ...]]
    reference: Callable[..., Any] | None = None
    replay: Callable[..., Any] | None = None
    coarse: str = ""
    exact: str = ""
    grads: bool = True
    mutates: bool = False
    narrow: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.run.__name__

    def operands(self, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
        """The operands in a dtype: the same numbers, rounded to it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.draw(Draw(dtype, self.narrow))


def program(draw: Callable[[Draw], tuple[Any, ...]], **facts: Any) -> Callable[..., Program]:
    """Make a program of a function: `@program(lambda r: (r(4, 8),))`."""
    return lambda run: Program(run, draw, **facts)


@dataclass(frozen=True)
class Draw:
    """Draws operands from torch's seeded generator.

    Attributes:
        dtype: Of what is floating.
        narrow: Whether to round to BF16 first.
    """

    dtype: torch.dtype
    narrow: bool = False

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        return self._round(torch.randn(shape) * scale)

    def positive(self, *shape: int) -> Tensor:
        """Numbers from 0.25 on."""
        return self._round(torch.rand(shape) + 0.25)

    def weight(self, *shape: int) -> nn.Parameter:
        """A parameter whose rows keep the size of what they multiply."""
        return nn.Parameter(self._round(torch.randn(shape) / shape[-1] ** 0.5))

    def wide(self, *shape: int) -> Tensor:
        """Normal numbers in FP32, whatever the program's dtype."""
        return torch.randn(shape)

    def ids(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high)."""
        return torch.randint(0, high, shape)

    def mask(self, *shape: int) -> Tensor:
        """Booleans; the first of each row is set."""
        drawn = torch.rand(shape) < 0.6
        drawn[..., 0] = True
        return drawn

    def module(self, make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        """A module in evaluation mode, its parameters drawn by itself."""
        module = make(*args, **kwargs).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() < 2:  # biases of zero and scales of one would hide faults
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
                if self.narrow:
                    parameter.copy_(parameter.bfloat16())
        return module.to(self.dtype)

    def _round(self, x: Tensor) -> Tensor:
        return (x.bfloat16() if self.narrow else x).to(self.dtype)
