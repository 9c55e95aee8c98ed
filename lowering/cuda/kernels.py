"""The Triton templates, loaded from `templates/*.py.jinja`. Imports `compat` and `cache_key`.

Inductor keeps templates by name for the whole process, so each is made once, here.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

from torch._inductor import config, ir

from healpass.cache_key import current_config
from healpass.lowering import compat
from healpass.lowering.compat import SymbolicGridFn, TritonTemplate

#: CUDA's limit of blocks along the second and third grid axis.
MAX_GRID_Y = 65535


#: Templates that share their text with another.
TEXTS = {
    "gemm_batched": "gemm",
    "grouped": "gemm",
    "layercast_batched": "layercast",
    "invariant": "decode",
    "exact_gemm_batched": "exact_gemm",
    "exact_grouped": "exact_gemm",
    "exact_grouped_sum": "exact_gemm",
    "exact_sums": "exact_gemm",
}
#: Macros, a file each, and what calls them: a template, or macros that stand before them here.
MACROS = {
    "paged_macros": ("paged_place(", "token_rows("),
    "exact_attention_spans": ("sums_span(",),
    "exact_attention_macros": ("exact_scores(", "tops_block("),
    "attention_fold": ("fold_block(",),
    "attention_macros": ("finish_scores(", "exact_scores("),
}
#: Device functions, a file each; one calls only those that stand before it.
HELPERS = ("helpers", "attention_helpers", "exact_helpers", "quantize_helpers")


def source(name: str) -> str:
    """Text of a template: its macros, itself, and the device functions that it calls."""
    text = _read(TEXTS.get(name, name))
    for part, calls in MACROS.items():
        if any(call in text for call in calls):
            text = _read(part) + text
    helpers = [function for part in HELPERS for function in _read(part).split("\n\n\n")]
    called: list[str] = []
    for function in reversed(helpers):  # a function calls only those that stand before it
        if f"{_function_name(function)}(" in "".join([text, *called]):
            called.insert(0, function)
    return "\n\n".join([text, *called])


def _read(part: str) -> str:
    folder = importlib.resources.files("healpass.lowering") / "templates"
    return (folder / f"{part}.py.jinja").read_text(encoding="utf-8")


def _function_name(function: str) -> str:
    return function.split("def ")[1].split("(")[0]


@SymbolicGridFn
def gemm_grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """One block per output tile.

    Args:
        m: Rows of the output.
        n: Columns of the output.
        meta: Knobs of the rendering: `BLOCK_M` and `BLOCK_N`.
        cdiv: Division rounded up, of numbers or of symbols.
    """
    return cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), 1, 1


@SymbolicGridFn
def batched_grid(
    batch: Any,
    m: Any,
    n: Any,
    meta: dict[str, Any],
    *,
    cdiv: Any,
    max: Any,  # noqa: A002
) -> tuple[Any, Any, Any]:
    """One block per output tile and batch entry; a long batch folds over two axes.

    Args:
        batch: Matrices of the output.
        m: Rows of the output.
        n: Columns of the output.
        meta: Knobs of the rendering: `BLOCK_M` and `BLOCK_N`.
        cdiv: Division rounded up, of numbers or of symbols.
        max: The larger of two, numbers or symbols.
    """
    depth = max(cdiv(batch, MAX_GRID_Y), 1)
    return cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), cdiv(batch, depth), depth


@SymbolicGridFn
def decode_grid(*sizes_and_meta: Any, cdiv: Any) -> tuple[Any, int, int]:
    """One block per tile of columns and chunk of K; sizes are `[M, N]` or `[SPLITS, M, N]`."""
    *sizes, meta = sizes_and_meta
    return cdiv(sizes[-1], meta["BLOCK_N"]), meta["SPLITS"], 1


@SymbolicGridFn
def attention_grid(
    heads: Any, rows: Any, chunks: Any, meta: dict[str, Any], *, cdiv: Any
) -> tuple[Any, int, int]:
    """One block per tile of rows, chunk of columns, and head of each batch entry.

    Args:
        heads: Key heads of the whole batch.
        rows: Of one key head: its queries times the heads that share it.
        chunks: Of keys; 1 where a program goes through all.
        meta: Knobs of the rendering: `BLOCK_M`.
        cdiv: Division rounded up, of numbers or of symbols.
    """
    return cdiv(rows, meta["BLOCK_M"]) * chunks * heads, 1, 1


@SymbolicGridFn
def attention_backward_key_grid(
    heads: Any, keys: Any, chunks: Any, meta: dict[str, Any], *, cdiv: Any
) -> tuple[Any, int, int]:
    """One block per tile of keys and key head of each batch entry.

    Args:
        heads: Key heads of the whole batch.
        keys: Of one key head.
        chunks: 1.
        meta: Knobs of the rendering: `BLOCK_N`.
        cdiv: Division rounded up, of numbers or of symbols.
    """
    return cdiv(keys, meta["BLOCK_N"]) * chunks * heads, 1, 1


@SymbolicGridFn
def grouped_grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """One block per output tile; every group, and what is in none, may end in half a tile.

    Args:
        m: Rows of all groups.
        n: Columns of the output.
        meta: Knobs of the rendering: `BLOCK_M`, `BLOCK_N` and `GROUPS`.
        cdiv: Division rounded up, of numbers or of symbols.
    """
    return (cdiv(m, meta["BLOCK_M"]) + meta["GROUPS"] + 1) * cdiv(n, meta["BLOCK_N"]), 1, 1


GRIDS = {
    "gemm": gemm_grid,
    "gemm_batched": batched_grid,
    "grouped": grouped_grid,
    "decode": decode_grid,
    "invariant": gemm_grid,
    "layercast": gemm_grid,
    "layercast_batched": batched_grid,
    "exact_gemm": gemm_grid,
    "exact_gemm_batched": batched_grid,
    "exact_grouped": grouped_grid,
    "exact_grouped_sum": batched_grid,
    "exact_sums": batched_grid,
    "attention": attention_grid,
    "attention_merge": attention_grid,
    "exact_attention_tops": attention_grid,
    "exact_attention_sums": attention_grid,
    "attention_backward_query": attention_grid,
    "attention_backward_key": attention_backward_key_grid,
}

#: Templates that are launched outside of graphs (`eager`).
EAGER = (
    *("paged_query", "paged_write", "paged_attention"),
    *("paged_tops", "paged_sums", "paged_settle"),
)


@functools.cache
def template(name: str) -> TritonTemplate:
    """The template of a name in `GRIDS`."""
    return TritonTemplate(name=f"heal_{name}", grid=GRIDS[name], source=source(name))


def select(
    name: str,
    nodes: Sequence[Any],
    layout: ir.Layout,
    renderings: Sequence[Mapping[str, Any]],
    **call: Any,
) -> ir.TensorBox:
    """Render a template by the best guess, or in all ways where Inductor is to time them.

    Args:
        name: Of the template.
        nodes: Its inputs in order.
        layout: Of its output.
        renderings: Knobs, the best guess first; they differ in tuning knobs only.
        **call: What Inductor takes beside them, as `mutated_inputs` and `call_sizes`.
    """
    timed = current_config().autotune or config.max_autotune or config.max_autotune_gemm
    choices: list[Any] = []
    for knobs in renderings if timed else renderings[:1]:
        compat.append_choice(
            template(name), choices, input_nodes=tuple(nodes), layout=layout, **call, **knobs
        )
    return compat.select(f"heal_{name}", choices, list(nodes), layout)
