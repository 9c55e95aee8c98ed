"""Choices among equals: the lowest index wins, on every device. Imports `ops.library`.

torch promises no order among equal elements for `argmax`, `topk` and an unstable `sort`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from healpass.ops.library import library

library.define("first_argmax(Tensor input, int? dim=None, bool keepdim=False) -> Tensor")
library.define("stable_topk(Tensor input, int k, int dim=-1, bool largest=True) -> Tensor[]")


@torch.library.impl(library, "first_argmax", "CompositeImplicitAutograd")
def first_argmax(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """`torch.argmax`, the first of equal maxima; a NaN counts as the largest, as in torch."""
    x = input.detach().reshape(-1) if dim is None else input.detach()
    axis = 0 if dim is None else dim
    is_top = (x == x.amax(axis, keepdim=True)) | x.isnan()
    length = x.shape[axis]
    shape = [length if d == axis % max(x.dim(), 1) else 1 for d in range(x.dim())]
    index = torch.arange(length, device=x.device).reshape(shape)
    first = torch.where(is_top, index, length).amin(axis, keepdim=keepdim and dim is not None)
    return first.reshape([1] * input.dim()) if keepdim and dim is None else first


@torch.library.impl(library, "stable_topk", "CompositeImplicitAutograd")
def stable_topk(input: Tensor, k: int, dim: int = -1, largest: bool = True) -> list[Tensor]:
    """`torch.topk` sorted, equal elements in the order of their indices."""
    values, indices = torch.sort(input, dim=dim, descending=largest, stable=True)
    return [values.narrow(dim, 0, k), indices.narrow(dim, 0, k)]
