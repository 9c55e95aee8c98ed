"""The pass that lets attention read a HealCache's integers. May import `ops` and below.

A HealCache hands out what it stores as values any model can use: `heal::dequantize(digits,
scale)`, or FP32 marked by `heal::stored`. Between that and attention lie moves only: views, the
expansion of grouped heads (`repeat_kv`), a slice of the keys. This pass looks through them and
gives attention the digits themselves, so that no FP32 copy of the cache exists.

It runs after promotion, which drops the casts to 16 bits that would lie in between. The cache's
own format decides how the query is quantized, whatever the default is. Exact attention has no FP32
format: it rounds what it reads of an FP32 cache.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from healpass.config import HealConfig
from healpass.errors import ConfigError
from healpass.graph.context import Context
from healpass.graph.nodes import Builder, heal_name, op_name, set_value, value
from healpass.graph.operator_names import words
from healpass.graph.passes.attention import arguments
from healpass.ops.attention.quantize import FORMATS
from healpass.ops.attention.sdpa import default_scale
from healpass.ops.products.numerics import Numerics

heal = torch.ops.heal

#: What may lie between a cache and attention. Sizes decide whether a view is a harmless one.
MOVES = words("getitem unsqueeze expand reshape view contiguous clone flatten to")


@dataclass(frozen=True)
class Read:
    """A cache's content on its way to attention: `[B, Hkv, S, E]`, its heads repeated at last.

    Attributes:
        source: The `heal::dequantize` or `heal::stored` node.
        sizes: B, Hkv, S and E.
        repeats: How often each head stands there.
        split: Whether the repeats have a dimension of their own, as `[B, Hkv, n, S, E]`.
        keys: The slice of the keys that attention sees, or None for all.
    """

    source: Node
    sizes: tuple[Any, ...]
    repeats: Any = 1
    split: bool = False
    keys: slice | None = None

    @property
    def format(self) -> str:
        """The `kv` of the cache."""
        if heal_name(self.source) == "heal::stored":
            return "fp32"
        planes = value(self.source.args[0]).shape[-3]
        return next(name for name, fmt in FORMATS.items() if fmt.digits == planes)

    def has_shape(self, tensor: Tensor) -> bool:
        """Whether a tensor has the sizes of this stage; compared as text, to add no guards."""
        batch, heads, keys, size = self.sizes
        joined = (batch, heads * self.repeats, keys, size)
        dims = (batch, heads, self.repeats, keys, size) if self.split else joined
        return [str(dim) for dim in tensor.shape] == [str(dim) for dim in dims]

    def operands(self, builder: Builder) -> list[Any]:
        """Digits and scale, cut to the keys that are read."""
        digits, scale = self.source.args
        if self.keys is None:
            return [digits, scale]
        cut = self.keys
        return [
            builder.call(operator.getitem, digits, (..., cut, slice(None))),
            builder.call(operator.getitem, scale, (..., cut)),
        ]


def fold_cache_reads(graph_module: GraphModule, context: Context) -> int:
    """Let every attention that reads a HealCache follow the cache's format; return how many.

    Raises:
        ConfigError: The options ask for another format than the cache has.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        if heal_name(node) != "heal::sdpa":
            continue
        given = arguments(node)
        key, states = trace(given["key"]), trace(given["value"])
        if key is not None and states is not None and key.format == states.format:
            if key.format == "fp32" and context.config.precision == "exact":
                continue
            _check(context.config, key.format)
            node.kwargs = {**node.kwargs, "kv": key.format}
            if key.format != "fp32" and _can_fold(node, given):
                _fold(node, given, (key, states), context.builder(graph_module, node))
            count += 1
    return count


def _check(config: HealConfig, found: str) -> None:
    if config.kv not in (None, found):
        raise ConfigError(
            f"kv={config.kv!r} was asked for, but the HealCache given to the model keeps "
            f"{found}. Make it HealCache(config, kv={config.kv!r}), or leave kv out: the cache's "
            "format is then used."
        )


# ---------------------------------------------------------------------------- looking through


def trace(node: Node) -> Read | None:
    """Follow moves up to a cache; None if anything else, or another order, is in between."""
    chain = []
    while heal_name(node) not in ("heal::dequantize", "heal::stored"):
        wide = isinstance(value(node), Tensor) and value(node).dtype == torch.float32
        if not wide or op_name(node) not in MOVES or not isinstance(node.args[0], Node):
            return None
        chain.append(node)
        node = node.args[0]
    if value(node).dim() != 4:
        return None
    read: Read | None = Read(node, tuple(value(node).shape))
    for move in reversed(chain):
        read = None if read is None else _after(move, read)
    return None if read is None or read.split else read


def _after(move: Node, read: Read) -> Read | None:
    """The stage after one move; None if the move does something else.

    Sizes tell: an expansion of a dimension of size 1 can only repeat, and a view from
    `[B, Hkv, n, S, E]` to `[B, Hkv * n, S, E]` can only join the heads.
    """
    name, result = op_name(move), value(move)
    if name == "getitem":
        stage = _indexed(move, read)
    elif name == "unsqueeze":
        single = not read.split and read.repeats == 1 and move.args[1] in (2, -3)
        stage = replace(read, split=True) if single else None
    elif name == "expand" and read.split and read.repeats == 1 and result.dim() == 5:
        stage = replace(read, repeats=result.shape[2])
    elif name in ("reshape", "view", "flatten") and read.split and result.dim() == 4:
        stage = replace(read, split=False)
    else:
        stage = read
    return stage if stage is not None and stage.has_shape(result) else None


def _indexed(move: Node, read: Read) -> Read | None:
    """After `states[:, :, None]` or `states[:, :, a:b]`; None for any other index."""
    index = move.args[1] if isinstance(move.args[1], tuple) else ()
    whole = all(part == slice(None) for part in (*index[:2], *index[3:]))
    if read.split or not whole or len(index) < 3:
        return None
    part = index[2]
    if part is None and read.repeats == 1:
        return replace(read, split=True)
    if isinstance(part, slice) and part.step is None and read.keys is None:
        batch, heads, _, size = read.sizes
        return replace(read, sizes=(batch, heads, value(move).shape[2], size), keys=part)
    return None


# ------------------------------------------------------------------------------------ folding


def _can_fold(node: Node, given: dict[str, Any]) -> bool:
    """Whether nobody needs a gradient or a random number, which digits do not carry.

    Nor an exact cap or exact sinks. Attention on the dequantized values then quantizes them again,
    to the same integers.
    """
    placeholders = (value(n) for n in node.graph.nodes if n.op == "placeholder")
    trained = any(getattr(item, "requires_grad", False) for item in placeholders)
    plain = given["dropout_p"] == 0.0 and value(given["query"]).dim() == 4
    if Numerics.parse(given["numerics"]).products is not None:
        plain = plain and given["softcap"] is None and given["sinks"] is None
    return plain and not (trained and torch.is_grad_enabled())


def _fold(node: Node, given: dict[str, Any], reads: tuple[Read, Read], builder: Builder) -> None:
    """Replace `heal::sdpa` by `heal::integer_attention` on the cache's digits."""
    query = given["query"]
    if given["scale"] is None:
        given["scale"] = default_scale(value(query).shape[-1])
    quantized = builder.call(heal.quantize.default, query, reads[0].format)
    rest = ("attn_mask", "sinks", "seed", "is_causal", "scale", "window", "softcap", "dropout_p")
    attended = builder.call(
        heal.integer_attention.default,
        builder.call(operator.getitem, quantized, 0),
        builder.call(operator.getitem, quantized, 1),
        *reads[0].operands(builder),
        *reads[1].operands(builder),
        *(given[name] for name in rest),
        given["numerics"],
    )
    result = builder.call(operator.getitem, attended, 0)
    set_value(result, value(node))
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
