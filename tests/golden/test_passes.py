"""What each pass makes of a graph: one short graph per pass, before and after, to be read.

After a change that is meant: `EXPECTTEST_ACCEPT=1 python -m pytest tests/golden/test_passes.py`
writes the `.expected` files anew. `sizes`, `flex`, `tensor_parallel` and the late passes, whose
graphs are long or look the same, have tests of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import healpass
from healpass.graph.pipeline import PASSES
from tests.support.against_torch import random

BF16 = torch.bfloat16
heal = torch.ops.heal


@dataclass(frozen=True)
class Example:
    """A function that a pass changes, its operands, the options, and whether under autocast."""

    function: Callable[..., Any]
    operands: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    autocast: bool = False


def from_a_cache(digits: Tensor, scale: Tensor, query: Tensor) -> Tensor:
    states = heal.dequantize(digits, scale).to(BF16)
    return F.scaled_dot_product_attention(query, states, states)


X, W = random(3, 8).to(BF16), random(8, 8, seed=1).to(BF16)
STATES = random(1, 2, 16, 8).to(BF16)
EXAMPLES = {
    "overloads": Example(torch.ops.aten.mul, (X, X)),
    "expand": Example(lambda x, w: torch.einsum("ij,kj->ik", x, w), (X, W)),
    "matmul": Example(lambda x, w: torch.addmm(x, x, w, alpha=0.5), (X, W)),
    "attention": Example(
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (STATES,)
    ),
    "prepack": Example(
        torch.nn.Linear(8, 8, bias=False, dtype=BF16).requires_grad_(False),
        (X,),
        {"prepack": True},
    ),
    "promote": Example(lambda x, w: F.silu(F.linear(x, w)) * x, (X, W)),
    "exact": Example(
        lambda x, w: F.rms_norm(F.linear(x, w), (8,)), (X, W), {"precision": "exact"}
    ),
    "cache_reads": Example(from_a_cache, (*heal.quantize(random(1, 2, 40, 8), "int16"), STATES)),
    "autocast": Example(lambda x, w: F.linear(x, w).relu(), (X.float(), W.float()), autocast=True),
}


@pytest.mark.parametrize("name", EXAMPLES)
@torch.no_grad()
def test_the_graph_before_and_after(name, monkeypatch):
    kept: dict[str, str] = {}

    def record(_name, metadata_fn=dict, payload_fn=str, **_):
        kept[metadata_fn().get("name", "")] = payload_fn()

    monkeypatch.setattr("healpass.graph.pipeline.torch._logging.trace_structured", record)
    example = EXAMPLES[name]
    with torch.autocast("cpu", dtype=BF16, enabled=example.autocast):
        healpass.explain(example.function, example.options)(*example.operands)
    text = "\n".join(
        f"# {when}\n{plain(kept[f'heal_{when}_{name}'])}" for when in ("before", "after")
    )
    assert plain(kept[f"heal_before_{name}"]) != plain(kept[f"heal_after_{name}"])
    path = Path(__file__).with_name(f"test_passes.{name}.expected")
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; read the module's head"


def plain(graph: str) -> str:
    """The lines of code that compute, without comments, source lines and `name = None`."""
    lines = [
        re.sub(r";\s+\w+ = .*$", "", line.split("#")[0]).rstrip() for line in graph.splitlines()
    ]
    return "\n".join(line for line in lines if line.strip()) + "\n"


def test_every_pass_has_an_example_or_a_reason():
    assert set(PASSES) - set(EXAMPLES) == {"sizes", "tensor_parallel", "flex"}
