"""Bit-reproducible operators as Triton code for a GPU: the CPU's bits, and no free rounding.

Inductor's generated kernels run in Triton's interpreter, which never contracts; so their PTX is
compiled, too, and read.
"""

from __future__ import annotations

import pytest
import torch

import healpass.ops  # noqa: F401
from healpass.backend import PINNED_SETTINGS
from tests.support import interpreter
from tests.support.bits import any_floats, differing, ordinary
from tests.support.fake_cuda import generated_source, kernels
from tests.support.ptx import free, ptx

heal = torch.ops.heal
POINTWISE = ("exp", "log1p", "sin", "gelu", "tanh", "rsqrt")


def pointwise(name):
    return lambda x: (getattr(heal, name)(x),)


ROWS = ordinary(6 * 48, 3.0).reshape(6, 48)
WEIGHT = ordinary(48, seed=1)
REDUCTIONS = {
    "sum": lambda x, w: (heal.sum(heal.mul(x, w), [1], False),),
    "rms_norm": lambda x, w: (heal.rms_norm(x, [48], w, 1e-5),),
    "softmax": lambda x, w: (heal.softmax(heal.mul(x, w), -1),),
    "rotary": lambda x, w: (heal.add(heal.mul(x, heal.cos(w)), heal.mul(x.flip(-1), w)),),
    "div": lambda x, w: (heal.div(x, w),),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_the_interpreter_gives_the_bits_of_the_cpu(name):
    x = torch.cat([any_floats(200), ordinary(60, 3.0)])
    source = generated_source(pointwise(name), [x], **PINNED_SETTINGS)
    assert differing(interpreter.run(source, x)[0], getattr(heal, name)(x)) == 0


@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_interpreter_gives_the_bits_of_the_cpu_for_rows(name):
    source = generated_source(REDUCTIONS[name], [ROWS, WEIGHT], **PINNED_SETTINGS)
    found = interpreter.run(source, ROWS, WEIGHT)[0]
    assert differing(found, REDUCTIONS[name](ROWS, WEIGHT)[0]) == 0


def all_ptx(function, operands, **settings) -> str:
    return "\n".join(map(ptx, kernels(generated_source(function, operands, **settings))))


@pytest.mark.parametrize("name", ["exp", "sin", "rsqrt", "rms_norm", "rotary", "div"])
def test_no_kernel_contracts_or_approximates(name):
    one = (pointwise(name), [ROWS]) if name in POINTWISE else (REDUCTIONS[name], [ROWS, WEIGHT])
    assert free(all_ptx(*one, **PINNED_SETTINGS)) == set()


def test_without_the_settings_a_kernel_would_contract():
    """The inverse."""
    contracted = all_ptx(pointwise("exp"), [ROWS], emulate_precision_casts=False)
    assert any(found.startswith("fma") for found in free(contracted))
