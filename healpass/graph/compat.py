"""Names under which torch 2.11 traces what later ones trace under another. Imports nothing.

A name belongs here only if it was seen in a graph. What differs in Inductor is in
`healpass.lowering.compat`.
"""

from __future__ import annotations

#: As 2.11 traces it -> as 2.13 to 2.15 do. Tensors are compared by methods there where both sides
#: come from a captured tensor; DTensor's methods are functions that Dynamo makes.
NAMES = {
    "__eq__": "eq",
    "__ne__": "ne",
    "__ge__": "ge",
    "__gt__": "gt",
    "__le__": "le",
    "__lt__": "lt",
    "prim from_local": "from_local",
    "prim_redistribute": "redistribute",
    "prim_to_local": "to_local",
}


def of_today(name: str | None) -> str | None:
    """The name by which the newest torch traces what is traced as `name`."""
    return name if name is None else NAMES.get(name, name)
