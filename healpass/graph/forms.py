"""The ways to write an operator, and the arguments of a node bound to them. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

#: torch's functions disagree with each other on some argument names.
ALIASES = {
    "self": "input",
    "a": "input",
    "mat_a": "input",
    "tensor": "other",
    "mat_b": "mat2",
    "p": "ord",
    "axis": "dim",
}
#: What changes no value.
IGNORED = frozenset({"inplace", "stable", "generator"})


@dataclass(frozen=True)
class Form:
    """One way to write an operator.

    Attributes:
        rule: Makes the nodes of its replacement; it gets the arguments in the order of `names`,
            and returns None where it has no meaning for them.
        names: torch's names of all arguments.
        positions: How many of them torch takes by position.
        defaults: What an argument is that is not given, if not None.
    """

    rule: Callable[..., Any]
    names: tuple[str, ...]
    positions: int
    defaults: dict[str, Any]


def form(rule: Callable[..., Any], names: str, **defaults: Any) -> Form:
    """A form by its signature as text, `"input mat2 * out"`: keywords only come after the star.

    Args:
        rule: As in `Form`.
        names: torch's names of the arguments, by spaces; those after the star have no position.
        **defaults: What an argument is that is not given, if not None.
    """
    positional, _, keywords = names.partition("*")
    first = positional.split()
    return Form(rule, (*first, *keywords.split()), len(first), defaults)


def bind(form: Form, node: Node) -> list[Any] | None:
    """The arguments of a node in the order of its form, defaults filled in.

    Returns:
        None where the node has an argument that the form has no place for.
    """
    if len(node.args) > form.positions:
        return None
    bound = dict(zip(form.names, node.args, strict=False))
    for key, argument in node.kwargs.items():
        name = key if key in form.names else ALIASES.get(key, key)
        if name in bound:
            return None
        if name in form.names:
            bound[name] = argument
        elif key not in IGNORED and argument is not None:
            return None
    return [bound.get(name, form.defaults.get(name)) for name in form.names]
