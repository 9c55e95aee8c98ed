"""The page of small programs: 1 to 8 lines of PyTorch each, as people write it.

`page()` lists them; `tests/support/judging.py` runs one and derives what its results may be off
by.
"""

from __future__ import annotations

from tests.programs import (
    arithmetic,
    attention,
    containers,
    indexing,
    layers,
    regions,
    sequence,
    training,
)
from tests.programs.record import Draw, Program

__all__ = ["Draw", "Program", "page"]


def page() -> list[Program]:
    """Every program, in the order of the files."""
    files = (
        arithmetic,
        indexing,
        attention,
        layers,
        sequence,
        training,
        regions,
        containers,
    )
    return [item for file in files for item in vars(file).values() if isinstance(item, Program)]
