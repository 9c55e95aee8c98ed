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


@torch.no_grad()
def reorder(model: nn.Module, seed: int) -> None:
    """Permute K of every linear layer, differently for each seed. Tied weights come apart."""
    generator = torch.Generator().manual_seed(seed)
    dims = _dimension_of_k()
    for module in model.modules():
        dim = next((dim for kind, dim in dims.items() if isinstance(module, kind)), None)
        if dim is None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        order = torch.randperm(weight.shape[dim], generator=generator).to(weight.device)
        module.weight = nn.Parameter(weight.index_select(dim, order), requires_grad=False)
        module.register_buffer("order_of_terms", order, persistent=False)
        module.register_forward_pre_hook(_permute)


def _dimension_of_k() -> dict[type[nn.Module], int]:
    from transformers.pytorch_utils import Conv1D

    return {nn.Linear: 1, Conv1D: 0}


def _permute(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].index_select(-1, module.order_of_terms), *inputs[1:])
