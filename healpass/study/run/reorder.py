"""A model whose linear layers add in another order, at full speed.

Layer: study. Imports nothing of ours, and transformers where it runs.

A sum over K of x[k] w[k] does not change if both are permuted, but its additions do. Weights are
permuted once, activations on their way in, so the same kernels run as in the natural order, and a
compiler sees an ordinary model. Sums outside of linear layers (attention, norms) stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def can_reorder(model: nn.Module) -> bool:
    """Whether all matrices of the model belong to linear layers, or are looked up by rows."""
    kinds = (*_dimension_of_k(), nn.Embedding)
    known = {
        id(p)
        for module in model.modules()
        if isinstance(module, kinds)
        for p in module.parameters(recurse=False)
    }
    return all(p.dim() < 2 or id(p) in known for p in model.parameters())


class Reordered:
    """A model whose linear layers add in an order that can be changed between two calls.

    Only values change with the order, so what was compiled for one holds for all.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        """Let activations be permuted on their way in; until `use` nothing moves.

        Args:
            model: One that `can_reorder`. Tied weights come apart.
        """
        self._layers: list[tuple[nn.Module, int]] = []
        dims = _dimension_of_k()
        for module in model.modules():
            dim = next((dim for kind, dim in dims.items() if isinstance(module, kind)), None)
            if dim is None:
                continue
            weight = module.weight
            assert isinstance(weight, Tensor)
            natural = torch.arange(weight.shape[dim], device=weight.device)
            module.register_buffer("order_of_terms", natural, persistent=False)
            module.register_forward_pre_hook(_permute)
            self._layers.append((module, dim))

    @torch.no_grad()
    def use(self, seed: int) -> None:
        """Permute K of every linear layer, differently for each seed; 0 is the natural order."""
        generator = torch.Generator().manual_seed(seed)
        for module, dim in self._layers:
            weight, now = module.weight, module.order_of_terms
            assert isinstance(weight, Tensor)
            assert isinstance(now, Tensor)
            size = weight.shape[dim]
            order = torch.randperm(size, generator=generator) if seed else torch.arange(size)
            order = order.to(weight.device)
            moved = weight.index_select(dim, now.argsort()[order])
            module.weight = nn.Parameter(moved, requires_grad=False)
            now.copy_(order)


def _dimension_of_k() -> dict[type[nn.Module], int]:
    from transformers.pytorch_utils import Conv1D

    return {nn.Linear: 1, Conv1D: 0}


def _permute(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].index_select(-1, module.order_of_terms), *inputs[1:])
