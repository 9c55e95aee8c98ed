"""What is timed: a language model, or the linear layers of a model that is not at hand.

Layer: bench. Imports `errors` and `integrations`. A source is a small record that travels to the
process of a contender, which loads from it what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from healpass.errors import ConfigError, FetchError, suggestion

#: (out, in) features of the linear layers of one block: q, k and v; output; gate and up; down.
SHAPES = {
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "qwen3-4b": ((6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)),
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}


@dataclass(frozen=True)
class ModelSource:
    """A causal language model: a folder, a hub id, or `smollm2-135m`."""

    name: str

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The model with its weights rounded to BF16, the format it is served in, as `dtype`.

        Raises:
            FetchError: It cannot be loaded.
        """
        from healpass.integrations import smollm2

        if self.name == smollm2.SMOLLM2.name:
            model: nn.Module = smollm2.load(dtype)[0]
            return model
        return _rounded(_pretrained(self.name, dtype))


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


def _pretrained(name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FetchError(
            f"cannot load {name!r} as a causal language model: {reason}\n"
            "Give a folder with config.json and weights, an id from the Hugging Face hub, or "
            "smollm2-135m."
        ) from error


def _rounded(model: nn.Module) -> nn.Module:
    """The model with parameters rounded to BF16: every contender multiplies the same numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model
