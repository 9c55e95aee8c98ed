"""`heal::listed_blocks` (composite): which keys the blocks of a FlexAttention mask reach.

A BlockMask lists, per block of queries, the blocks of keys that are looked at. May import
`products.matmul`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from healpass.ops.library import library

library.define(
    "listed_blocks(Tensor counts, Tensor indices, SymInt rows, SymInt columns, SymInt length, "
    "SymInt keys) -> Tensor"
)


@torch.library.impl(library, "listed_blocks", "CompositeImplicitAutograd")
def listed_blocks(
    counts: Tensor, indices: Tensor, rows: int, columns: int, length: int, keys: int
) -> Tensor:
    """Bool `[B, H, length, keys]`: whether a key lies in a listed block of its query.

    Args:
        counts: INT32 `[B, H, M]`: how many blocks each block of queries lists.
        indices: INT32 `[B, H, M, N]`: their numbers first, anything behind them.
        rows: Queries in a block.
        columns: Keys in a block.
        length: Queries.
        keys: Keys.
    """
    blocks = indices.shape[-1]
    valid = torch.arange(blocks, device=indices.device) < counts.unsqueeze(-1)
    target = torch.where(valid, indices, blocks).to(torch.int64)  # the last column is scrap
    listed = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    listed = listed.scatter(-1, target, True)
    query = torch.arange(length, device=indices.device) // rows
    key = torch.arange(keys, device=indices.device) // columns
    return listed[:, :, query[:, None], key]
