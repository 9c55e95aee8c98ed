"""Pinned operators as Triton code for a GPU: the CPU's bits, and no free rounding.

Inductor's generated kernels run in Triton's interpreter, which never contracts; so their PTX is
compiled, too, and read.
"""

from __future__ import annotations

import ast
import re

import pytest
import torch
import triton
from exactly import any_floats, differing, ordinary
from torch._inductor.codecache import PyCodeCache
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import healpass.ops  # noqa: F401
from healpass.backend import PINNED_SETTINGS
from tests import interpreter
from tests.fake_cuda import Kernel, generated_source, kernels

heal = torch.ops.heal
#: A contracted multiply-add, approximate division and functions, flushed subnormals.
FREE = re.compile(r"\b(?:fma\.\w+\.f(?:32|64)|div\.full|\w+\.approx|\w+\.ftz)[\w.]*")

#: Sizes of the generated kernels' blocks; they decide no instruction that rounds.
BLOCKS = {"XBLOCK": 128, "YBLOCK": 1, "R0_BLOCK": 64}
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


def ptx(kernel: Kernel, capability: int = 90) -> str:
    """A generated kernel compiled with the settings that stand in its own source."""
    heading, name = kernel.source[: kernel.source.index("@triton_heuristics")], kernel.name
    module = PyCodeCache.load(
        heading.replace("triton_helpers.set_driver_to_gpu()", "") + kernel.body
    )
    function = getattr(module, name)
    signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", kernel.source)[1])
    fusion = re.search(r"'enable_fp_fusion': (True|False)", kernel.source)
    constants = {block: size for block, size in BLOCKS.items() if signature.get(block)}
    source = ASTSource(function, signature, constexprs=constants)
    options = {"enable_fp_fusion": fusion is None or fusion[1] == "True"}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm["ptx"]


def all_ptx(function, operands, **settings) -> str:
    return "\n".join(map(ptx, kernels(generated_source(function, operands, **settings))))


@pytest.mark.parametrize("name", ["exp", "sin", "rsqrt", "rms_norm", "rotary", "div"])
def test_no_kernel_contracts_or_approximates(name):
    one = (pointwise(name), [ROWS]) if name in POINTWISE else (REDUCTIONS[name], [ROWS, WEIGHT])
    assert set(FREE.findall(all_ptx(*one, **PINNED_SETTINGS))) == set()


def test_without_the_settings_a_kernel_would_contract():
    """The inverse."""
    free = all_ptx(pointwise("exp"), [ROWS], emulate_precision_casts=False)
    assert any(found.startswith("fma") for found in FREE.findall(free))
