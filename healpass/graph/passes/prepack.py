"""The pass behind `prepack=True`: frozen BF16 weights enter in FP16. Imports `ops`.

FP16 times a power of two per output channel takes the bytes of BF16 and needs no conversion in the
kernel for many rows, which otherwise reads a BF16 weight twice (once for its scales):

    x @ w.T = (x @ packed.T) * scale,    w = packed * scale up to 2^-40 of the channel's maximum

The graph then takes `packed` where it took the weight, and `scale` as a further input; the
callable that Dynamo gets converts each weight once and hands both over. The model's own weight
stays as it is, so the conversion costs memory: as much again as the converted weights, said in a
warning. A packed channel's maximum is 2^16, so a row of `x` whose magnitudes add up to 2^112 or
more overflows, whatever the weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.arithmetic.pieces import pack_fp16
from healpass.graph.context import Context
from healpass.graph.nodes import is_parameter, propagating, set_value, value

LINEAR = torch.ops.heal.linear.default
#: Key in a graph module's `meta`: positions of the inputs that are packed, in order.
POSITIONS = "heal_prepacked"
#: The same for how many inputs the graph had before.
COUNT = "heal_inputs"


class PrepackWarning(UserWarning):
    """Weights are held twice, in two formats."""


def prepack(graph_module: GraphModule, context: Context) -> int:
    """Let frozen BF16 weights of linear layers enter packed; return how many."""
    inputs = list(graph_module.graph.find_nodes(op="placeholder"))
    chosen = [node for node in inputs if context.config.prepack and _can_pack(node)]
    last = inputs[-1] if inputs else None
    for weight in chosen:
        last = _pack(graph_module, context, weight, last)
    if chosen:
        graph_module.meta[POSITIONS] = tuple(map(inputs.index, chosen))
        graph_module.meta[COUNT] = len(inputs)
    return len(chosen)


def _can_pack(node: Node) -> bool:
    """A frozen BF16 parameter that nothing but linear layers reads (no tied embedding)."""
    weight = value(node)
    frozen = is_parameter(node) and not weight.requires_grad and weight.dtype == torch.bfloat16
    return frozen and weight.dim() == 2 and all(_is_weight_of(user, node) for user in node.users)


def _is_weight_of(user: Node, node: Node) -> bool:
    return user.target is LINEAR and user.args[1] is node and user.args[0] is not node


def _pack(graph_module: GraphModule, context: Context, weight: Node, last: Any) -> Node:
    """Add an input for the scale after the last input, and apply it after each product."""
    with graph_module.graph.inserting_after(last):
        scale = graph_module.graph.placeholder(f"{weight.name}_scale")
    # Dynamo makes an argument for every placeholder from its meta: here the weight once more,
    # which the callable replaces. AOTAutograd refuses a second input with the same source.
    scale.meta = {k: v for k, v in weight.meta.items() if k != "tensor_dict"}
    scale._dynamo_source = None
    original = value(weight)
    with propagating(context.fake_mode):
        packed = torch.empty_like(original, dtype=torch.float16)
        set_value(weight, torch.nn.Parameter(packed, requires_grad=False))
        set_value(scale, torch.empty(original.shape[0], device=original.device))
    for user in list(weight.users):
        _scale_product(graph_module, context, user, scale)
    return scale


def _scale_product(graph_module: GraphModule, context: Context, linear: Node, scale: Node) -> None:
    rows, weight, *rest = (*linear.args, None, "heal")[:4]
    builder = context.builder(graph_module, linear)
    product = builder.call(LINEAR, rows, weight, None, rest[1])
    result = builder.call(torch.mul, product, scale)
    if rest[0] is not None:
        result = builder.call(torch.add, result, rest[0])
    linear.replace_all_uses_with(result)
    graph_module.graph.erase_node(linear)


# --------------------------------------------------------------------------- inputs at run time


@dataclass(frozen=True)
class Packed:
    """A converted weight: `[N, K]` FP16 and `[N]` FP32, and the version it was made of."""

    weight: Tensor
    scale: Tensor
    version: int


@cache
def _store() -> WeakTensorKeyDictionary:
    """One conversion per weight for all graphs; it goes when the weight goes."""
    return WeakTensorKeyDictionary()


def packed(weight: Tensor) -> Packed:
    """The conversion of a weight, made anew if the weight has been written to."""
    version = 0 if weight.is_inference() else weight._version
    known = _store().get(weight)
    if known is None or known.version != version:
        pieces = pack_fp16(weight.detach())
        assert pieces.scale is not None, "pack_fp16 scales"
        known = Packed(pieces.pieces[0], pieces.scale.squeeze(-1), version)
        _store()[weight] = known
    return known


def example_inputs(graph_module: GraphModule, inputs: list[Any]) -> list[Any]:
    """What the rewritten graph takes, as the fake values of its placeholders."""
    if POSITIONS not in graph_module.meta:
        return inputs
    changed = [value(node) for node in graph_module.graph.find_nodes(op="placeholder")]
    positions = graph_module.meta[POSITIONS]
    kept = [changed[i] if i in positions else example for i, example in enumerate(inputs)]
    return kept + changed[len(inputs) :]


def with_packed_inputs(
    graph_module: GraphModule, compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """The callable that Dynamo gets: converts weights, then calls the compiled graph."""
    positions: tuple[int, ...] = graph_module.meta.get(POSITIONS, ())
    if not positions:
        return compiled
    count: int = graph_module.meta[COUNT]
    announced: list[int] = []

    def call(*inputs: Any) -> Any:
        weights = [packed(inputs[position]) for position in positions]
        if not announced:
            announced.append(_announce(weights))
        converted = list(inputs[:count])
        for position, weight in zip(positions, weights, strict=True):
            converted[position] = weight.weight
        return compiled(*converted, *(weight.scale for weight in weights))

    return call


def _announce(weights: list[Packed]) -> int:
    size = sum(weight.weight.nbytes + weight.scale.nbytes for weight in weights)
    warnings.warn(
        f"prepack=True holds {len(weights)} weights of this graph a second time, in FP16: "
        f"{size / 2**20:.1f} MiB beside the model's own BF16 weights, shared by all its graphs.\n"
        "Leave prepack out to hold them once, or load the model in FP16, which needs no packing.",
        PrepackWarning,
        stacklevel=3,
    )
    return size
