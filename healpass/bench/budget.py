"""What rounding to a contender's number formats costs, by formula. Layer: bench.

Imports `bench.*`, the formulas of `arithmetic` and `ops`, and `HealConfig`. With a model the
yardstick of the gate rounds as the contender does (`int16-eager` has an INT16 cache). Layers and
attention alone are plain torch there: FP32, which rounds neither Q, K and V to INT16 nor operands
to digits. So what that costs comes from the formulas that go with the bounds, and not from running
HEAL's operators, which could be wrong together with the kernels that are judged:

* `exact`'s layers: `products.exact.error_deviation`;
* attention over integers: the companion of `arithmetic.attention_bounds`.

Each is the standard deviation of an element's error, rounding errors being independent. The norm
of thousands of elements lies close to the norm of their deviations; the gate allows twice that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from healpass import HealConfig
from healpass.arithmetic.attention_bounds import (
    AttentionShape,
    attention_bound,
    attention_magnitudes,
)
from healpass.bench.contenders import Contender
from healpass.bench.subject import Subject
from healpass.bench.workloads import Workload, activations_of, states_of
from healpass.ops.products.exact import error_deviation

#: Formats that attention over operands in FP32 rounds Q, K and V to.
_INTEGERS = ("int16", "int24")
#: Columns of a product at once: some copies of a weight in FP64 are needed.
_COLUMNS = 2048


def rounding(contender: Contender, workload: Workload, reference: Subject) -> float:
    """Frobenius norm of what a contender's formats lose, where its yardstick does not lose it.

    Args:
        contender: Who is judged.
        workload: Doing what.
        reference: The FP64 contender, whose operands are the exact ones.
    """
    if contender.compiler != "heal" or reference.config is not None:
        return 0.0
    config = HealConfig.read(**contender.options)
    if workload.kind == "attention":
        kv = config.attention_format
        return _attention(reference, workload.size, kv) if kv in _INTEGERS else 0.0
    if config.precision != "exact":
        return 0.0
    return _products(reference, workload.size, config.digit_products)


def _products(reference: Subject, size: int, products: int) -> float:
    """Of `exact`'s layers: FP32 activations, BF16 weights."""
    module: Any = reference.module
    squares = 0.0
    for layer, x in zip(module.layers, activations_of(reference, size), strict=True):
        for weight in layer.weight.detach().to(torch.bfloat16).split(_COLUMNS):
            deviation = error_deviation(x.to(torch.float32), weight.t(), products)
            squares += float(deviation.square().sum())
    return math.sqrt(squares)


def _attention(reference: Subject, size: int, kv: str) -> float:
    """Of causal attention; head by head, as scores in FP64 are large."""
    query, key, value = states_of(reference, size)
    groups = query.shape[1] // key.shape[1]
    bound = attention_bound(AttentionShape(query.shape[-1], size, kv=kv))
    hidden = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    squares = 0.0
    for head in range(query.shape[1]):
        q, k, v = query[:, head], key[:, head // groups], value[:, head // groups]
        scale = 1 / math.sqrt(q.shape[-1])
        scores = (scale * (q @ k.mT)).masked_fill(hidden, -math.inf)
        magnitudes: dict[str, Tensor | float] = {
            **attention_magnitudes(q, k, v, scores, scale),
            "lambda": 1.0,
        }
        deviation = bound.evaluate_probabilistic(**magnitudes).expand_as(v)
        squares += float(deviation.square().sum())
    return math.sqrt(squares)
