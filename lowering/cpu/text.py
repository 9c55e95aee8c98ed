"""What the C++ templates have in common: their text, and where an input begins."""

from __future__ import annotations

import importlib.resources
from typing import Any

from torch._inductor.codegen.cpp_utils import cexpr_index


def source(name: str) -> str:
    """The text of `templates/NAME.cpp.jinja`."""
    folder = importlib.resources.files("healpass.lowering") / "templates"
    return (folder / f"{name}.cpp.jinja").read_text(encoding="utf-8")


def pointer(kernel: Any, node: Any) -> str:
    """Where an input begins: two inputs may be views of one buffer, which then has one name.

    Args:
        kernel: Inductor's, of the template that is written.
        node: The input.
    """
    offset = cexpr_index(kernel.rename_indexing(node.get_layout().offset))
    return f"{kernel.args.input(node.get_name())} + {offset}"
