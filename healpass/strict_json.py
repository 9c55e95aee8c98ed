"""JSON that every reader accepts. Layer: lowest; imports nothing of healpass.

Python writes the words NaN and Infinity, which JSON (RFC 8259) does not have: a browser refuses
the whole file. Here a number that is not finite is written as its name, "nan", "inf" or "-inf",
which `float()` reads back.
"""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(content: Any, indent: int | None = None) -> str:
    """Return plain data (dicts, lists, tuples, numbers, strings, None) as JSON."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(item) for item in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree
