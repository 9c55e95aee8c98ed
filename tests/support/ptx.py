"""PTX of generated kernels, Inductor's own and templates, and what must not stand in it."""

from __future__ import annotations

import ast
import re

import triton
from torch._inductor.codecache import PyCodeCache
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.sass import binary
from tests.support.fake_cuda import Kernel

#: What has more than one right result: a contracted multiply-add, approximate division and
#: functions, flushed subnormals.
FREE = re.compile(r"\b(?:fma\.\w+\.f(?:32|64)|div\.full|\w+\.approx|\w+\.ftz)[\w.]*")

#: Sizes of the blocks of Inductor's own kernels; they decide no instruction that rounds.
BLOCKS = {"XBLOCK": 128, "YBLOCK": 1, "R0_BLOCK": 64}


def free(text: str) -> set[str]:
    """Instructions of PTX that have more than one right result."""
    return set(FREE.findall(text))


def ptx(kernel: Kernel, capability: int = 90) -> str:
    """A generated kernel compiled with the settings that stand in its own source."""
    if kernel.is_template:
        text: str = binary(kernel, capability).asm["ptx"]
        return text
    heading, name = kernel.source[: kernel.source.index("@triton_heuristics")], kernel.name
    module = PyCodeCache.load(
        heading.replace("triton_helpers.set_driver_to_gpu()", "") + kernel.body
    )
    signature = ast.literal_eval(_found(r"'signature': (\{.*?\})", kernel.source, "{}"))
    constants = {block: size for block, size in BLOCKS.items() if signature.get(block)}
    source = ASTSource(getattr(module, name), signature, constexprs=constants)
    fusion = _found(r"'enable_fp_fusion': (True|False)", kernel.source, "True")
    options = {"enable_fp_fusion": fusion == "True"}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm["ptx"]


def _found(pattern: str, text: str, otherwise: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else otherwise
