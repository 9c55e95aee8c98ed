"""The gate of `healpass bench --shapes`: what number formats cost is allowed, and no more.

Good kernels and broken ones are stood in for by operators and their parts, judged as `run` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from healpass.bench.budget import rounding
from healpass.bench.contenders import CONTENDERS, REFERENCE, choose
from healpass.bench.run import Plan, limit, measure, relative_error
from healpass.bench.source import ShapesSource
from healpass.bench.subject import Subject
from healpass.bench.workloads import Workload, activations_of, states_of
from healpass.ops.products.exact import exact_matmul
from tests.support.attention_bounds import Digits

SOURCE = ShapesSource("smollm2-135m")
ROWS = Workload("prefill", 4)
TOKENS = Workload("attention", 40)
#: What a contender of FP32 with the same outputs may lose besides.
ROUNDOFF = 2.0**-24


@functools.cache
def subject(name: str) -> Subject:
    with torch.no_grad():
        return Subject(CONTENDERS[name], SOURCE, "cpu")


@functools.cache
def outputs(name: str, workload: Workload) -> np.ndarray:
    """Of an eager contender, in FP64."""
    with torch.no_grad():
        return workload.prepare(subject(name)).outputs().double().numpy()


def judged(name: str, workload: Workload, found: Tensor) -> tuple[float, float]:
    """The error of outputs and the limit of the contender they are said to be of."""
    exact = outputs(REFERENCE, workload)
    yardstick = relative_error(outputs(CONTENDERS[name].yardstick, workload), exact)
    with torch.no_grad():
        lost = rounding(CONTENDERS[name], workload, subject(REFERENCE))
    allowed = limit(yardstick, ROUNDOFF, lost / float(np.linalg.norm(exact)))
    error = relative_error(found.double().numpy().reshape(exact.shape), exact)
    print(f"{name}, {workload.name}: observed/limit {error / allowed:.3g}, limit {allowed:.3g}")
    without = limit(yardstick, ROUNDOFF)
    print(f"  without the cost of its formats the limit would be {without:.3g}")
    return error, allowed


def layers(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The layers by `product` of FP32 `[M, K]` and BF16 `[K, N]`."""
    reference = subject(REFERENCE)
    pairs = zip(reference.module.layers, activations_of(reference, ROWS.size), strict=True)
    with torch.no_grad():
        found = [product(x.float(), layer.weight.bfloat16().t()) for layer, x in pairs]
    return torch.cat([y.flatten() for y in found])


BROKEN_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a digit less": lambda x, w: exact_matmul(x, w, 3),
    "a thousandth": lambda x, w: exact_matmul(x, w) * (1 + 1e-3),
    "BF16 activations": lambda x, w: exact_matmul(x.bfloat16(), w),
    "a term of K": lambda x, w: exact_matmul(x[:, 1:], w[1:]),
    "a tile of zeros": lambda x, w: exact_matmul(x, w).index_fill(1, torch.arange(16), 0.0),
    "NaN": lambda x, w: exact_matmul(x, w) * torch.nan,
}


def test_layers_of_exact_pass():
    """The yardstick alone, which rounds to no digits, would refuse them."""
    error, allowed = judged("exact", ROWS, layers(exact_matmul))
    assert error <= allowed
    exact = outputs(REFERENCE, ROWS)
    assert error > limit(relative_error(outputs("fp32-eager", ROWS), exact), ROUNDOFF)


@pytest.mark.parametrize("broken", BROKEN_PRODUCTS)
def test_broken_layers_of_exact_are_refused(broken):
    error, allowed = judged("exact", ROWS, layers(BROKEN_PRODUCTS[broken]))
    assert not error <= allowed


def attention(
    kv: str, spoil: Callable[[Digits, str], Tensor] = lambda x, _: x.values, **how: bool
) -> Tensor:
    """Causal attention in FP64 on integers, each of Q, K and V put in by `spoil`."""
    query, key, value = (
        spoil(Digits.of(x.float(), kv), name)
        for x, name in zip(states_of(subject(REFERENCE), TOKENS.size), "qkv", strict=True)
    )
    causal = {"is_causal": True, **how}
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **causal)


def coarser(x: Digits, name: str, which: str, bits: int) -> Tensor:
    """One of the three with some bits less."""
    if name != which:
        return x.values
    step = 2**bits * x.scale.double()[..., None]
    return (x.values / step).round() * step


def low_digit_lost(x: Digits, name: str) -> Tensor:
    return x.values - (x.planes[:, :, 0].double() * x.scale.double()[..., None]) * (name == "v")


def token_off(x: Digits, name: str) -> Tensor:
    """The scale of one token of V is that of its neighbour."""
    values = x.values.clone()
    if name == "v":
        values[:, :, 5] *= (x.scale[:, :, 6] / x.scale[:, :, 5]).double()[..., None]
    return values


BROKEN_ATTENTION: dict[str, Callable[[], Tensor]] = {
    # Keys are a small share of the whole error.
    "12-bit keys": lambda: attention("int16", functools.partial(coarser, which="k", bits=4)),
    "14-bit values": lambda: attention("int16", functools.partial(coarser, which="v", bits=2)),
    "low digit of V": lambda: attention("int16", low_digit_lost),
    "a token's scale": lambda: attention("int16", token_off),
    "no mask": lambda: attention("int16", is_causal=False),
    "two ten thousandths": lambda: attention("int16") * (1 + 2e-4),
    "BF16 result": lambda: attention("int16").bfloat16(),
}


@pytest.mark.parametrize(("name", "kv"), [("heal", "int16"), ("exact", "int16"),
                                          ("heal-int24", "int24")])  # fmt: skip
def test_attention_over_integers_passes(name, kv):
    error, allowed = judged(name, TOKENS, attention(kv).float())
    assert error <= allowed


def test_int16_attention_would_be_refused_by_the_yardstick_alone():
    error, _ = judged("heal", TOKENS, attention("int16").float())
    exact = outputs(REFERENCE, TOKENS)
    assert error > limit(relative_error(outputs("int16-eager", TOKENS), exact), ROUNDOFF)


@pytest.mark.parametrize("broken", BROKEN_ATTENTION)
def test_broken_attention_is_refused(broken):
    error, allowed = judged("heal", TOKENS, BROKEN_ATTENTION[broken]())
    assert not error <= allowed


def test_int24_is_not_given_what_int16_costs():
    error, allowed = judged("heal-int24", TOKENS, attention("int16").float())
    assert not error <= allowed


@pytest.mark.parametrize(
    ("name", "workload"),
    [
        ("fp32-inductor", ROWS),
        ("bf16-inductor", TOKENS),
        ("layercast", ROWS),
        ("layercast", TOKENS),
        ("heal-fp32", TOKENS),
        ("heal", ROWS),
    ],
)
def test_formats_that_the_yardstick_has_cost_nothing_more(name, workload):
    assert rounding(CONTENDERS[name], workload, subject(REFERENCE)) == 0.0


@pytest.mark.parametrize(("name", "kind"), [("exact", "decode"), ("heal", "attention")])
def test_what_is_compiled_passes(name, kind):
    """`healpass bench --shapes`, the contender in its process."""
    (row,) = measure(Plan(SOURCE, choose((name,)), (Workload(kind, 16),), "cpu", 1, 1))
    print(f"{row.workload}, {row.contender}: observed/limit {row.error / row.limit:.3g}")
    assert row.note == ""
    assert row.median is not None


@dataclass(frozen=True)
class Off(ShapesSource):
    """Layers whose BF16 weights are a hundredth too large."""

    def load(self, dtype: torch.dtype) -> torch.nn.Module:
        layers = super().load(dtype)
        if dtype == torch.bfloat16:
            for parameter in layers.parameters():
                parameter.data *= 1.01
        return layers


def test_what_is_compiled_and_wrong_is_refused():
    work = (Workload("decode", 16),)
    (row,) = measure(Plan(Off(SOURCE.name), choose(("exact",)), work, "cpu", 1, 1))
    assert row.error > row.limit
    assert row.note.startswith("refused: its error")
    assert row.median is None
