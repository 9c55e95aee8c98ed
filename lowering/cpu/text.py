"""What the C++ templates have in common: their text, and where an input begins."""

from __future__ import annotations

import importlib.resources
from typing import Any

from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP, cexpr_index


def source(name: str) -> str:
    """The text of `templates/NAME.cpp.jinja`."""
    folder = importlib.resources.files("healpass.lowering") / "templates"
    return (folder / f"{name}.cpp.jinja").read_text(encoding="utf-8")


def pointer(kernel: Any, node: Any) -> str:
    """Where an input begins, as its own dtype.

    Two inputs may be views of one buffer, which then has one name, and one dtype.

    Args:
        kernel: Inductor's, of the template that is written.
        node: The input.
    """
    offset = cexpr_index(kernel.rename_indexing(node.get_layout().offset))
    c_type = DTYPE_TO_CPP[node.get_dtype()]
    return f"reinterpret_cast<const {c_type}*>({kernel.args.input(node.get_name())}) + {offset}"
