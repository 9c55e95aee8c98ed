"""Reads of one element in several places, trained: their gradients are exact sums.

Rules for the pass `exact`, which asks them only where an operand gets a gradient. An index is a
lookup in a table, so `heal::embedding` takes its place; a repetition is an expansion, so zeros of
the expanded shape are added by `heal::add`. Both add in integers, in any order to one result. A
rule returns None for a call in a form that it does not know; the report lists the node then. May
import `ops` and below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.graph.nodes import Builder, op_name, value

heal = torch.ops.heal
FULL = (slice(None), Ellipsis)

#: Called with the arguments of the node.
Read = Callable[..., Node | None]


def reads_by_index(node: Node) -> bool:
    """Whether a `getitem` reads by integers in a tensor, or in a list, which may repeat."""
    if op_name(node) != "getitem" or not isinstance(value(node.args[0]), torch.Tensor):
        return False
    return any(isinstance(item, list) or _is_index(item) for item in _items(node.args[1]))


def _items(index: Any) -> tuple[Any, ...]:
    return tuple(index) if isinstance(index, tuple) else (index,)


def _is_index(item: Any) -> bool:
    """Whether an item of a subscript is a tensor of integers; masks (bool, uint8) read once."""
    tensor = value(item) if isinstance(item, Node) else None
    return isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.int64, torch.int32)


# ------------------------------------------------------------------------------------- lookups


def _rows(b: Builder, x: Node, dim: int, index: Node) -> Node:
    """What `index`, without negative numbers, reads along `dim`; its dimensions stand there."""
    table = x if dim == 0 else b.call(torch.movedim, x, dim, 0)
    read = b.call(heal.embedding.default, table, index, -1)
    count = value(index).dim()
    if dim == 0 or count == 0:
        return read
    return b.call(torch.movedim, read, tuple(range(count)), tuple(range(dim, dim + count)))


def _counted(b: Builder, index: Node, size: Any) -> Node:
    """The index with negative numbers counted from the end."""
    from_end = b.call(torch.add, index, size)
    return b.call(torch.where, b.call(torch.lt, index, 0), from_end, index)


def _index_select(b: Builder, input: Node, dim: int, index: Node) -> Node | None:
    if value(input).dim() == 0:
        return None
    return _rows(b, input, dim % value(input).dim(), b.method("reshape", index, -1))


def _getitem(b: Builder, input: Node, index: Any) -> Node | None:
    """One tensor among full slices, or several as the leading subscripts."""
    items, shape = _items(index), b.sizes(input)
    places = [place for place, item in enumerate(items) if _is_index(item)]
    rest = [item for place, item in enumerate(items) if place not in places]
    if not places or any(not any(item is full or item == full for full in FULL) for item in rest):
        return None
    if len(places) > 1:
        leading = places == list(range(len(places)))
        return _leading(b, input, items[: len(places)]) if leading else None
    (place,) = places
    dim = place if Ellipsis not in rest[:place] else len(shape) - (len(items) - place)
    return _rows(b, input, dim, _counted(b, items[place], shape[dim]))


def _leading(b: Builder, input: Node, indices: Sequence[Node]) -> Node:
    """`x[i, j]`: one index into the first dimensions as one."""
    sizes = b.sizes(input)[: len(indices)]
    joined = _counted(b, indices[0], sizes[0])
    for index, size in zip(indices[1:], sizes[1:], strict=True):
        joined = b.call(torch.add, b.call(torch.mul, joined, size), _counted(b, index, size))
    return _rows(b, b.call(torch.flatten, input, 0, len(indices) - 1), 0, joined)


def _take(b: Builder, input: Node, index: Node) -> Node:
    flat = b.method("reshape", input, -1)
    return _rows(b, flat, 0, _counted(b, index, b.product(*b.sizes(input))))


def _gather(
    b: Builder, input: Node, dim: int, index: Node, *, sparse_grad: bool = False
) -> Node | None:
    """One index into all elements; so all gradients share the unit of their sum."""
    shape, size = b.sizes(input), b.sizes(index)
    if sparse_grad or not shape or len(size) != len(shape):
        return None
    dim %= len(shape)
    place = b.call(torch.mul, index, b.product(*shape[dim + 1 :]))
    for axis in (axis for axis in range(len(shape)) if axis != dim):
        steps = b.call(torch.arange, size[axis], device=value(index).device)
        steps = b.call(torch.mul, steps, b.product(*shape[axis + 1 :]))
        along = [-1 if axis == other else 1 for other in range(len(shape))]
        place = b.call(torch.add, place, b.method("reshape", steps, along))
    return _rows(b, b.method("reshape", input, -1), 0, place)


def _take_along_dim(b: Builder, input: Node, indices: Node, dim: int | None = None) -> Node | None:
    if dim is None:
        return _take(b, input, b.method("reshape", indices, -1))
    shape, size = list(value(input).shape), list(value(indices).shape)
    dim %= len(shape)
    if shape[:dim] + shape[dim + 1 :] != size[:dim] + size[dim + 1 :]:
        return None  # one of them is broadcast
    return _gather(b, input, dim, _counted(b, indices, b.sizes(input)[dim]))


# --------------------------------------------------------------------------------- repetitions


def _spread(b: Builder, x: Node, thin: Sequence[Any], wide: Sequence[Any]) -> Node:
    """`x` as `thin`, expanded to `wide`."""
    zeros = b.call(torch.zeros, list(wide), dtype=torch.float32, device=value(x).device)
    return b.call(heal.add.default, b.method("reshape", x, list(thin)), zeros)


def _repeat(b: Builder, input: Node, *sizes: Any, repeats: Any = None) -> Node:
    given = repeats if repeats is not None else sizes
    if len(given) == 1 and isinstance(given[0], (tuple, list, torch.Size)):
        given = given[0]
    counts, shape = list(given), b.sizes(input)
    shape = [1] * (len(counts) - len(shape)) + shape
    pairs = list(zip(counts, shape, strict=True))
    thin = [size for pair in pairs for size in (1, pair[1])]
    wide = [size for pair in pairs for size in pair]
    spread = _spread(b, input, thin, wide)
    return b.method("reshape", spread, [b.product(*pair) for pair in pairs])


def _tile(b: Builder, input: Node, *sizes: Any, dims: Any = None) -> Node:
    given = dims if dims is not None else sizes
    if len(given) == 1 and isinstance(given[0], (tuple, list, torch.Size)):
        given = given[0]
    return _repeat(b, input, [1] * (value(input).dim() - len(given)) + list(given))


def _repeat_interleave(
    b: Builder, input: Node, repeats: Any, dim: int | None = None, *, output_size: Any = None
) -> Node | None:
    del output_size  # follows from the rest
    shape = b.sizes(input)
    if not isinstance(repeats, int):
        return None
    if dim is None:
        shape, dim = [b.product(*shape)], 0
    dim %= len(shape)
    before, after = shape[: dim + 1], shape[dim + 1 :]
    spread = _spread(b, input, [*before, 1, *after], [*before, repeats, *after])
    return b.method("reshape", spread, [*before[:-1], b.product(before[-1], repeats), *after])


READS: dict[str, Read] = {
    "index_select": _index_select,
    "getitem": _getitem,
    "take": _take,
    "gather": _gather,
    "take_along_dim": _take_along_dim,
    "repeat": _repeat,
    "tile": _tile,
    "repeat_interleave": _repeat_interleave,
}
