"""Runs a small program: its results, what it wrote, and every gradient, as one flat list."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from tests.programs import Program


def leaves(tree: Any) -> list[Any]:
    """The tensors and numbers of a result: dataclasses are opened, structure is dropped."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = vars(tree)
    found = pytree.tree_leaves(tree)
    return [leaf for leaf in found if isinstance(leaf, (Tensor, float, int))]


def operand_tensors(operands: Any) -> list[Tensor]:
    """Every tensor the caller owns: parameters and buffers of modules, too."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(operands):
        if isinstance(leaf, nn.Module):
            found += [*leaf.parameters(), *leaf.buffers()]
        elif isinstance(leaf, Tensor):
            found.append(leaf)
    return found


def in_dtype(operands: Any, dtype: torch.dtype) -> Any:
    """A copy of the operands in a dtype."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, nn.Module):
            return copy.deepcopy(leaf).to(dtype)
        if isinstance(leaf, Tensor):
            return leaf.detach().clone().to(dtype if leaf.is_floating_point() else leaf.dtype)
        return leaf

    return pytree.tree_map(convert, operands)


def evaluate(run: Callable[..., Any], operands: Any, program: Program, grads: bool) -> list[Any]:
    """Results, then what became of written operands, then gradients of every operand."""
    trained = _trained(operands, program) if grads else []
    for leaf in pytree.tree_leaves(operands) if program.mutates else ():
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.requires_grad_(False)
    for tensor in trained:
        tensor.requires_grad_()
    with torch.set_grad_enabled(grads):
        results = leaves(run(*operands))
    gradients = _gradients(results, trained) if trained else []
    written = operand_tensors(operands) if program.mutates else []
    return [*results, *written, *gradients]


def _trained(operands: Any, program: Program) -> list[Tensor]:
    """Parameters that are trained, and floating tensors, unless they may be written."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(operands):
        if isinstance(leaf, nn.Module):
            found += [p for p in leaf.parameters() if p.requires_grad]
        elif isinstance(leaf, Tensor) and leaf.is_floating_point() and not program.mutates:
            found.append(leaf)
    return found


def _gradients(results: list[Any], trained: list[Tensor]) -> list[Tensor]:
    differentiable = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
    if not differentiable:
        return []
    generator = torch.Generator().manual_seed(1)
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        cotangents = [_cotangent(t, generator) for t in differentiable]
    found = torch.autograd.grad(differentiable, trained, cotangents, allow_unused=True)
    return [g for g in found if g is not None]


def _cotangent(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers that every format holds."""
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return drawn.to(torch.bfloat16).to(like.dtype)
