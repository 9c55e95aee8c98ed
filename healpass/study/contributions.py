"""What each rounding of a 16-bit model contributes: one change at a time.

Layer: study. Imports `study` only.

The model runs in FP32, and one kind of its values is rounded to 16 bits as the 16-bit model rounds
it. The relative error of the logits then tells what that kind costs alone. The kinds: what a
key/value cache keeps, the attention weights P, the results of matmuls, of norms, the rest
(residual stream, activations), and all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.study.baselines import Products, attention
from healpass.study.blame import Session, deviation
from healpass.study.configuration import Configuration
from healpass.study.interpret import Watch

CACHE = "key/value cache"
WEIGHTS = "attention weights P"
MATMULS = "results of matmuls"
NORMS = "norms"
REST = "residual stream and the rest"
ALL = "all of these"
KINDS = (CACHE, WEIGHTS, MATMULS, NORMS, REST)


@dataclass(frozen=True)
class Contribution:
    """One kind of rounding.

    Attributes:
        kind: What is rounded.
        error: Relative error of the logits against FP32.
    """

    kind: str
    error: float


def contributions(session: Session, dtype: torch.dtype) -> list[Contribution]:
    """Round one kind of values after the other to a 16-bit dtype, and all at last."""
    fp32 = Configuration(precision="fp32")
    modules = kinds_of_modules(session.checkpoint.model())
    exact = session.run(fp32, watch_of(frozenset(), dtype, modules))
    found = []
    for name, kinds in [*((kind, frozenset({kind})) for kind in KINDS), (ALL, frozenset(KINDS))]:
        logits = session.run(fp32, watch_of(kinds, dtype, modules))
        found.append(Contribution(name, deviation(exact, logits)))
    return found


def kinds_of_modules(model: Any) -> dict[str, str | None]:
    """The kind of each leaf module's result; None for tables that are FP32 or exact anyway."""
    found: dict[str, str | None] = {}
    for path, module in model.named_modules():
        name = type(module).__name__.lower()
        if any(True for _ in module.children()):
            continue
        if name in ("linear", "conv1d"):
            found[path] = MATMULS
        elif "norm" in name:
            found[path] = NORMS
        elif "rotary" in name or "embedding" in name:
            found[path] = None
    return found


def watch_of(
    kinds: frozenset[str], dtype: torch.dtype, modules: Mapping[str, str | None]
) -> Watch:
    """A watch that rounds these kinds of values."""

    def rounded(kind: str | None, x: Tensor) -> Tensor:
        return x.to(dtype).to(x.dtype) if kind in kinds else x

    def see(name: str, value: Tensor) -> Tensor:
        if name.endswith(":attention"):
            return rounded(MATMULS, value)
        return rounded(modules.get(name, REST), value)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        products = Products(torch.matmul, lambda p, v: rounded(WEIGHTS, p) @ v)
        key, value = rounded(CACHE, key), rounded(CACHE, value)
        return attention(products, query, key, value, *args, **kwargs)

    return Watch(see, {torch._C._nn.scaled_dot_product_attention: sdpa})
