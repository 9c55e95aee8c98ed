"""The compiler that vLLM gets: without vLLM."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from healpass.integrations.vllm.compiled import compiler, multiplier
from healpass.integrations.vllm.options import EngineOptions
from tests.support.bits import differing

EXACT, HEAL = (EngineOptions.read({"precision": name}) for name in ("exact", "heal"))


def inverted(x):
    return torch.linalg.inv(x) + torch.sin(x)


def test_a_graph_with_another_arithmetic_in_it_is_refused_in_exact():
    x = torch.eye(3) + 0.1
    with pytest.raises(BackendCompilerFailed, match=r"linalg_inv.* has no exact operator"):
        torch.compile(inverted, backend=compiler(EXACT))(x)
    torch._dynamo.reset()
    torch.compile(inverted, backend=compiler(HEAL))(x)


def test_a_graph_that_is_exact_throughout_compiles():
    x = torch.linspace(-3, 3, 40).reshape(4, 10)
    compiled = torch.compile(lambda x: torch.sin(x).exp(), backend=compiler(EXACT))
    expected = torch.ops.heal.exp(torch.ops.heal.sin(x))
    assert differing(compiled(x), expected) == 0


def test_a_compiled_head_has_the_bits_of_the_operator():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 64, generator=generator), torch.randn(40, 64, generator=generator)
    weight = weight.to(torch.bfloat16)
    eager, compiled = (multiplier(EXACT, compiled) for compiled in (False, True))
    assert differing(compiled(x, weight, None), eager(x, weight, None)) == 0
