"""Promotion through operators that call a subgraph. May import `graph.nodes` and below.

`checkpoint`, `wrap` and `invoke_subgraph` run their body once and pass values through: FP32
activations go in and come out. The branches of `cond` must agree, so both hand out FP32. Loops
(`scan`, `while_loop`, `map`) must hand on what they take in, so they carry FP32. All others, such
as custom autograd functions, keep their traced dtypes at the border; inside them matmuls are
rewritten all the same. FlexAttention's bodies are left alone: its kernel hands them FP32 scores
whatever dtype was traced.

Several calls may share one body (`torch.compiler.nested_compile_region`), and torch compiles that
body once, for what the first of them hands in. Promotion can make the calls differ: the first
layer gets 16 bits and the next one FP32. So a body is never promoted itself: each kind of call
gets a copy of its own, and `invoke_subgraph`, which torch knows by a name, a name of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from healpass.graph import node_classes
from healpass.graph.borders import REGION, inputs_of, results_of
from healpass.graph.context import Context, Variant
from healpass.graph.nodes import (
    Builder,
    is_floating,
    is_half,
    propagating,
    set_value,
    value,
    with_gradient_of,
)

FP32 = torch.float32
TRANSPARENT = ("tag_activation_checkpoint", "wrap", REGION, "wrap_activation_checkpoint")
#: Of each loop: which argument it carries from step to step, and which it takes row by row.
LOOPS: dict[str, tuple[int | None, int | None]] = {
    "scan": (1, 2),
    "while_loop": (2, None),
    "map_impl": (None, 1),
}
#: A value of now, and the one that Dynamo traced in its place.
Pair = tuple[Any, Any]


def promote_call(promotion: Any, node: Node) -> None:
    """Promote a higher-order operator and the subgraphs it calls."""
    name = str(node.target)
    bodies = [
        n for n in node.all_input_nodes if n.op == "get_attr" and _body(promotion, n) is not None
    ]
    if name in TRANSPARENT and len(bodies) == 1:
        first = node.args.index(bodies[0]) + (2 if name == REGION else 1)
        _through(promotion, node, bodies, _pairs(promotion, node.args[first:]))
    elif name == "cond" and len(bodies) == 2:
        _through(promotion, node, bodies, _pairs(promotion, node.args[3]))
    elif name == "register_hook" and len(bodies) == 1:
        _hook(promotion, node, bodies[0])
    elif name in LOOPS and bodies:
        _loop(promotion, node, bodies, *LOOPS[name])
    else:
        promotion.foreign(node)
        for body in bodies if "flex_attention" not in name else ():
            _use(promotion, node, body, None, None)


def bodies_of(graph_module: GraphModule) -> dict[str, GraphModule]:
    """The subgraphs that a graph refers to, by the names of their attributes."""
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")]
    found = {name: getattr(graph_module, name, None) for name in names}
    return {name: item for name, item in found.items() if isinstance(item, GraphModule)}


def _body(promotion: Any, node: Node) -> GraphModule | None:
    """The body as it was traced: what its attribute holds may be promoted by now."""
    found: GraphModule | None = promotion.bodies.get(str(node.target))
    return found


def _pairs(promotion: Any, operands: Any) -> list[Pair]:
    """The values of what is handed in: those of now and those that were traced."""
    return [(value(operand), promotion.traced.get(operand)) for operand in operands]


def _through(
    promotion: Any, node: Node, bodies: list[Node], operands: list[Pair], carried: int = 0
) -> None:
    """Hand promoted operands in and promoted results out, FP32 wherever one body makes FP32.

    So are the first results, as many as are `carried` from step to step, if they were 16 bits.
    """
    call = node if len(bodies) > 1 or carried else None  # what leaves it follows from more than it
    used = [_use(promotion, node, body, call, operands) for body in bodies]
    results = [results_of(body) for body in used]
    traced = value(node)
    wide = [
        any(_is_fp32(value(items[i])) for items in results) or (i < carried and is_half(part))
        for i, part in enumerate(traced)
    ]
    for body in used:
        _widen_outputs(promotion, body, wide)
    with propagating(promotion.context.fake_mode):
        parts = [
            with_gradient_of(part, part.to(FP32)) if is_half(part) and widen else part
            for part, widen in zip(traced, wide, strict=True)
        ]
    set_value(node, type(traced)(parts))
    promotion.changed += 1


def _hook(promotion: Any, node: Node, reference: Node) -> None:
    """A hook on the gradient of a tensor gets and gives that tensor's dtype, which is FP32 now."""
    watched = value(node.args[0])
    body = _use(promotion, node, reference, None, _pairs(promotion, node.args[:1]))
    _widen_outputs(promotion, body, [_is_fp32(watched)] * len(results_of(body)))
    set_value(node, watched)
    promotion.changed += 1


def _loop(promotion: Any, node: Node, bodies: list[Node], carried_at: Any, rows_at: Any) -> None:
    """Let a loop carry FP32 where 16 bits were traced, and hand each step promoted rows.

    A weight that is trained is upcast before the loop: its gradient is a sum over the steps, which
    is taken in FP32 and rounded once.
    """
    first = len(bodies)
    _allow_counters(promotion.context)

    def enter(place: int, argument: Any) -> Any:
        def wide(operand: Node) -> Node:
            summed = place != rows_at and node_classes.trained(operand)
            narrow = is_half(value(operand)) and (place == carried_at or summed)
            return promotion.cast(operand, FP32, node) if narrow else operand

        return map_arg(argument, wide) if place >= first else argument

    before = [_traced_of(promotion, items) for items in node.args]
    node.args = tuple(enter(place, argument) for place, argument in enumerate(node.args))
    operands: list[Pair] = []
    with propagating(promotion.context.fake_mode):
        for place in range(first, len(node.args)):
            items: Any = node.args[place]
            for now, traced in zip(map(value, items), before[place], strict=True):
                operands.append((now[0], traced[0]) if place == rows_at else (now, traced))
    steps = bodies[-1:]
    for condition in bodies[:-1]:
        _use(promotion, node, condition, node, operands)
    carried: Any = () if carried_at is None else node.args[carried_at]
    _through(promotion, node, steps, operands, len(carried))


def _allow_counters(context: Context) -> None:
    """Let Inductor index a row by a loop's counter, which is a number that data decide.

    It makes a `while_loop` of `scan` and `map`, and without `fullgraph=True` torch gives the graph
    a fake mode that refuses such numbers, to break the graph there. In these modes, of this graph
    alone, nothing is left to break.
    """
    tracing = torch._guards.TracingContext.try_get()
    for mode in (context.fake_mode, tracing.fake_mode if tracing else None):
        if mode is not None:
            mode.allow_scalar_outputs = True


def _traced_of(promotion: Any, items: Any) -> list[Any]:
    several = isinstance(items, (tuple, list))
    return [promotion.traced.get(x, value(x)) for x in items] if several else []


def _is_fp32(item: Any) -> bool:
    return is_floating(item) and item.dtype == FP32


# --------------------------------------------------------------------------- a copy for each kind


def _use(
    promotion: Any, node: Node, reference: Node, call: Node | None, operands: list[Pair] | None
) -> GraphModule:
    """Let `node` call the copy of a body that was promoted for such operands.

    Args:
        promotion: The walk over the graph that calls.
        node: The call.
        reference: The `get_attr` node of the body, an argument of the call.
        call: The call, where its copy may serve no other one.
        operands: What is handed in, in order; None where the body keeps its traced border.

    Returns:
        The copy.
    """
    body = _body(promotion, reference)
    assert body is not None, "the caller has looked"
    name = str(node.args[1]) if str(node.target) == REGION else None
    given = None if operands is None else [now for now, _ in operands]
    forms = tuple(_form(*pair) for pair in operands or ())
    key = (id(body), call, name, given is None, forms)
    found = promotion.context.variants.get(key)
    if found is None:
        found = _promoted(promotion, body, given, name)
        promotion.context.variants[key] = found
    attribute = _attach(promotion, str(reference.target), found.body)
    with promotion.graph.inserting_before(node):
        node.replace_input_with(reference, promotion.graph.get_attr(attribute))
    if name is not None:
        node.args = (node.args[0], found.name, *node.args[2:])
    if not reference.users:
        promotion.graph.erase_node(reference)
    return found.body


def _attach(promotion: Any, name: str, body: GraphModule) -> str:
    """Make a copy an attribute of the graph, the first one in the place of what was traced."""
    owner = promotion.graph_module
    if getattr(owner, name) is promotion.bodies[name]:
        setattr(owner, name, body)
    names = (name, *(f"{name}_heal_{i}" for i in range(1, len(promotion.context.variants) + 1)))
    attribute = next(n for n in names if getattr(owner, n, body) is body)
    setattr(owner, attribute, body)
    return attribute


def _form(now: Any, traced: Any) -> Any:
    """What a body's promotion depends on, of an operand: dtype, role, and a changed layout.

    Sizes are left out: calls that share a body were traced with sizes that fit it.
    """
    if not isinstance(now, Tensor):
        return None
    strides, before = _strides(now), _strides(traced)
    role = isinstance(now, torch.nn.Parameter), now.requires_grad
    return now.dtype, now.device, *role, None if strides == before else strides


def _strides(item: Any) -> Any:
    plain = isinstance(item, Tensor) and item.layout == torch.strided
    wrapped = plain and torch._C._functorch.is_functorch_wrapped_tensor(item)
    return tuple(map(str, item.stride())) if plain and not wrapped else None


def _promoted(
    promotion: Any, body: GraphModule, operands: list[Any] | None, name: str | None
) -> Variant:
    """Copy and promote a body; `operands` are its inputs' new values, None leaves them as traced.

    A body with given operands hands out what it computes; otherwise its outputs keep their dtypes.
    """
    context = promotion.context
    copied = _copy(body, context)
    inner = type(promotion)(copied, context, "traced" if operands is None else "promoted")
    for placeholder, operand in zip(inputs_of(copied), operands or (), strict=False):
        inner.traced[placeholder] = value(placeholder)
        if isinstance(operand, Tensor):
            set_value(placeholder, _entered(value(placeholder), operand, context))
    inner.run()
    copied.recompile()
    return Variant(copied, body, _unused(name, context))


def _entered(traced: Any, operand: Tensor, context: Context) -> Tensor:
    """The value of an input: the operand, in the sizes that this body was traced with."""
    if list(map(str, traced.shape)) == list(map(str, operand.shape)):
        return operand
    if traced.dtype == operand.dtype:
        return traced
    with propagating(context.fake_mode):
        return with_gradient_of(operand, traced.to(operand.dtype))


def _unused(name: str | None, context: Context) -> str | None:
    """A name that no body has had: torch takes bodies of one name for the same one.

    Nor may the first copy keep the traced name. Under that torch may have noted the traced body
    already, when Dynamo ran it, and it would run that one again.
    """
    if name is None:
        return None
    taken = {variant.name for variant in context.variants.values()}
    numbered = (f"{name}_heal_{i}" for i in range(len(taken) + 1))
    return next(free for free in numbered if free not in taken)


def _copy(body: GraphModule, context: Context) -> GraphModule:
    """The same nodes with the same values, and the bodies that they call as they are."""
    graph, copies = Graph(), dict[Node, Node]()
    result = graph.graph_copy(body.graph, copies)
    output = graph.output(result)
    output.meta = copy.copy(body.graph.output_node().meta)
    context.kept |= {copies[n]: why for n, why in context.kept.items() if n in copies}
    copied = GraphModule(body, graph, body.__class__.__name__)
    copied.meta = dict(body.meta)
    return copied


# ------------------------------------------------------------------------------- what comes out


def _widen_outputs(promotion: Any, body: GraphModule, wide: list[bool]) -> None:
    output = body.graph.output_node()
    builder = Builder(body.graph, output, promotion.context.fake_mode)

    def widened(result: Any, widen: bool) -> Any:
        narrow = widen and isinstance(result, Node) and is_half(value(result))
        return builder.cast(result, FP32) if narrow else result

    results = [widened(*pair) for pair in zip(results_of(body), wide, strict=True)]
    if results != results_of(body):
        given = output.args[0]
        output.args = (type(given)(results) if isinstance(given, (tuple, list)) else results[0],)
        body.recompile()
