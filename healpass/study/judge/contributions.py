"""What each rounding contributes: one change at a time, in a model that runs in FP32.

Layer: study. Imports `tensorcore`, the `heal::` operators by their public name, and `study`.

*A 16-bit model* rounds five kinds of values: what a key/value cache keeps, the attention weights
P, the results of matmuls, of norms, and the rest (residual stream, activations). *HEAL* keeps all
of those in FP32 and rounds Q, K and V to its cache's format, and P and V to two FP16 pieces where
a tensor core multiplies them. All of HEAL with `kv="fp32"` is FP32 in another order of sums.

The relative error of the logits tells what a kind costs alone. Errors of independent kinds would
add up as squares. They need not be independent: a rounding changes what the later ones act on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from healpass.study.judge.blame import Session, deviation
from healpass.study.plan.configuration import Configuration
from healpass.study.run.baselines import Products, attention
from healpass.study.run.interpret import Watch
from healpass.tensorcore import weighted_values

CACHE = "key/value cache"
WEIGHTS = "attention weights P"
MATMULS = "results of matmuls"
NORMS = "norms"
REST = "residual stream and the rest"
ALL = "all of these"
KINDS = (CACHE, WEIGHTS, MATMULS, NORMS, REST)

#: The formats of Q, K and V, as `kv=` names them; FP32 is no rounding.
KV_FORMATS = ("fp32", "int24", "int16")
PIECES = "P and V in two FP16 pieces"

#: From this factor between all together and independent single errors on, the report says that
#: they do not add up.
ADDS_UP = 2.0


@dataclass(frozen=True)
class Contribution:
    """One kind of rounding.

    Attributes:
        kind: What is rounded.
        error: Relative error of the logits against FP32.
    """

    kind: str
    error: float


def contributions(session: Session, precision: str) -> list[Contribution]:
    """What the roundings of a precision cost, one by one and together.

    Args:
        session: The model and the text.
        precision: `bf16`, `fp16` or `heal`; the others round nothing that could be told apart.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in dtypes:
        changes = rounded_to(dtypes[precision], kinds_of_modules(session.checkpoint.model()))
    elif precision == "heal":
        changes = rounded_by_heal()
    else:
        return []
    plain = Configuration(precision="fp32")
    exact = session.run(plain, Watch(_unchanged))
    found = [
        Contribution(kind, deviation(exact, session.run(plain, watch)))
        for kind, watch in changes.items()
    ]
    if precision == "heal":
        for kv in KV_FORMATS:
            own = session.run(Configuration(precision="heal", kv=kv), Watch(_unchanged))
            found.append(Contribution(all_of_heal(kv), deviation(exact, own)))
    return found


def independent(parts: Sequence[Contribution]) -> float | None:
    """What the single errors would be together if they were independent; None without `ALL`."""
    if not any(part.kind == ALL for part in parts):
        return None
    return math.hypot(*(part.error for part in parts if part.kind != ALL))


def adds_up(parts: Sequence[Contribution]) -> bool:
    """Whether all roundings together cost what independent ones would, within `ADDS_UP`."""
    alone = independent(parts)
    together = next((part.error for part in parts if part.kind == ALL), None)
    if alone is None or together is None:
        return False
    return together <= ADDS_UP * alone and alone <= ADDS_UP * together


def rounded_to(dtype: torch.dtype, modules: Mapping[str, str | None]) -> dict[str, Watch]:
    """By kind, a watch that rounds it to a 16-bit dtype; the last rounds all kinds."""
    single = {kind: watch_of(frozenset({kind}), dtype, modules) for kind in KINDS}
    return single | {ALL: watch_of(frozenset(KINDS), dtype, modules)}


def rounded_by_heal() -> dict[str, Watch]:
    """By kind, a watch that rounds as HEAL's attention does."""
    plain = Products(torch.matmul, torch.matmul)
    pieces = Products(torch.matmul, partial(weighted_values, accumulate="fp32"))
    found = {PIECES: _attending(pieces, lambda states: states)}
    for kv in KV_FORMATS[1:]:
        found[f"Q, K and V in {kv.upper()}"] = _attending(plain, partial(_stored, kv))
    return found


def all_of_heal(kv: str) -> str:
    """The kind of all that HEAL does, with this format of its cache."""
    return f"all of HEAL, kv={kv}"


def _stored(kv: str, states: Tensor) -> Tensor:
    """`[B, H, S, E]` as `kv=` keeps it, with a scale per token and head."""
    return torch.ops.heal.dequantize(*torch.ops.heal.quantize(states, kv))


def _attending(products: Products, store: Callable[[Tensor], Tensor]) -> Watch:
    """A watch that changes attention only."""

    def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attention(products, store(query), store(key), store(value), *args, **kwargs)

    return Watch(_unchanged, {torch._C._nn.scaled_dot_product_attention: sdpa})


def _unchanged(name: str, value: Tensor) -> Tensor:
    del name
    return value


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
    """A watch that rounds these kinds of values.

    Args:
        kinds: Some of `KINDS`.
        dtype: The 16-bit dtype that they are rounded to.
        modules: The kind of each leaf module by its path, as `kinds_of_modules` gives them.
    """

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
