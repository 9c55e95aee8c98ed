"""What is timed: a language model, or the linear layers of a model that is not at hand.

Layer: bench. Imports `errors` and `integrations`. A source is a small record that travels to the
process of a contender, which loads from it what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from healpass.errors import ConfigError, suggestion

#: (out, in) features of the linear layers of one block: q, k and v; output; gate and up; down.
SHAPES = {
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "qwen3-4b": ((6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)),
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model: query heads, key heads, and the size of one."""

    queries: int
    keys: int
    size: int


HEADS = {
    "llama-3-8b": Heads(32, 8, 128),
    "qwen3-4b": Heads(32, 8, 128),
    "smollm2-135m": Heads(9, 3, 64),
}


@dataclass(frozen=True)
class ModelSource:
    """A causal language model: a folder, a hub id, a GGUF file, or `smollm2-135m`."""

    name: str

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The model with its weights rounded to BF16, the format it is served in, as `dtype`.

        Raises:
            FetchError: It cannot be loaded.
            StudyError: It is no causal language model.
        """
        from healpass.integrations.checkpoint import Checkpoint

        model: nn.Module = Checkpoint(self.name).model(str(dtype).removeprefix("torch."))
        return model


@dataclass(frozen=True)
class ShapesSource:
    """The linear layers of one block, with random weights: `SHAPES` has the names.

    Raises:
        ConfigError: The name is unknown.
    """

    name: str

    def __post_init__(self) -> None:
        """Check the name."""
        if self.name not in SHAPES:
            raise ConfigError(
                f"no shapes are known for {self.name!r}.{suggestion(self.name, SHAPES)}\n"
                f"There are: {', '.join(SHAPES)}."
            )

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The layers, their weights BF16 numbers in `dtype`."""
        return Layers(SHAPES[self.name]).to(torch.bfloat16).to(dtype)


Source = ModelSource | ShapesSource


class Layers(nn.Module):
    """Linear layers side by side, each with an input of its own width."""

    def __init__(self, shapes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(_random(n, k, generator) for n, k in shapes)

    def forward(self, *activations: Tensor) -> tuple[Tensor, ...]:
        """Multiply each activation `[M, K]` by its layer's weight."""
        return tuple(layer(x) for layer, x in zip(self.layers, activations, strict=True))


def _random(n: int, k: int, generator: torch.Generator) -> nn.Linear:
    """A layer from K to N features whose outputs are about as large as its inputs."""
    layer = nn.Linear(k, n, bias=False)
    nn.init.normal_(layer.weight, std=k**-0.5, generator=generator)
    return layer
