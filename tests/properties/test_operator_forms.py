"""Every operator that torch lists, in every form, through all passes: nothing raises or is wrong.

`operator_programs` makes the graphs. Operands are 16-bit where an operator knows such, so that the
graph is promoted. What is compared is what `against_torch` derives: the rewritten graph and torch
in FP32 are two FP32 evaluations of one operator on the same numbers. `exact` rounds in its own
way, and gets one rounding to BF16 more. What the report lists as running as traced has BF16's
error.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from healpass.config import HealConfig
from healpass.graph.passes.exact_rules import TIES
from tests.support.against_torch import U
from tests.support.operator_programs import Program, UntraceableError, programs

#: Operators per test: one failure names its program, and pytest-xdist can share the rest.
STRIDE = 64
#: Of these, one in so many is tried outside the deep run.
SAMPLED = 48
PRECISIONS = ("heal", "layercast", "exact")


def check(program: Program, config: HealConfig, *, dynamic: bool) -> bool:
    """Compare a program with torch; False where torch cannot run it or draws random numbers."""
    exactly = config.precision == "exact"
    trained = exactly and not dynamic  # half of the rules ask for gradients
    try:
        program.graph(dynamic, trained)
        single, exact = program.run(torch.float32), program.run(torch.float64)
        again = program.run(torch.float32)
    except (UntraceableError, RuntimeError, TypeError, ValueError):  # torch refuses the sample
        return False
    results, as_traced = program.rewritten(config, dynamic=dynamic, trained=trained)
    single = program.run(torch.bfloat16) if as_traced else single
    if not all(map(_equal, single, again)):
        return False
    assert len(results) == len(exact), program.name
    for result, wide, reference in zip(results, single, exact, strict=True):
        assert result.shape == wide.shape, program.name
        by_rank = exactly and any(name in program.name for name in TIES)
        if by_rank and not result.is_floating_point():
            continue  # of equal numbers `exact` takes the first, torch any
        if not _equal(result, wide):
            ratio = _ratio(*map(_numbers, (result, wide, reference)), rounded=as_traced or exactly)
            assert ratio <= 1, f"{program.name}, {config.precision}, dynamic={dynamic}: {ratio}"
    return True


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).double()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(_numbers(x).nan_to_num(nan=12345.0) for x in (one, other)))


def _ratio(
    result: torch.Tensor, wide: torch.Tensor, reference: torch.Tensor, *, rounded: bool
) -> float:
    """Observed error over its bound; infinity where only one of the two is finite."""
    finite = reference.isfinite() & wide.isfinite()
    if not torch.equal(result.isfinite(), wide.isfinite()):
        return torch.inf
    scale = float(reference[finite].abs().max()) if finite.any() else 0.0
    own = float((wide - reference)[finite].abs().max()) if finite.any() else 0.0
    budget = 2 * own + 4 * U * scale + (2.0**-8 * scale if rounded else 0.0)
    error = float((result - reference)[finite].abs().max()) if finite.any() else 0.0
    return error / budget if error else 0.0


def run(first: int, step: int, samples: int, precisions: tuple[str, ...]) -> tuple[int, int]:
    """Check operators `first, first + step ...`; how many programs were compared, of how many."""
    compared = total = 0
    for info in op_db[first::step]:
        for program in programs(info, samples):
            for precision in precisions:
                kv = None if precision == "exact" else "fp32"
                config = HealConfig(precision=precision, outputs="fp32", kv=kv)
                for dynamic in (False, True):
                    compared += check(program, config, dynamic=dynamic)
                    total += 1
    print(f"{compared} of {total} programs compared with FP64")
    return compared, total


def test_a_sample_of_operators_in_every_form():
    compared, total = run(3, SAMPLED, 1, ("heal", "exact"))
    assert compared > total / 2


@pytest.mark.deep
@pytest.mark.parametrize("first", range(STRIDE))
def test_every_operator_in_every_form(first):
    run(first, STRIDE, 2, PRECISIONS)


def test_a_wrong_rewrite_is_caught(monkeypatch):
    """The inverse: a rule that forgets a factor."""
    from healpass.graph.passes import matmul

    info = next(info for info in op_db if info.name == "addmm")
    program = next(programs(info, 1))
    config = HealConfig(outputs="fp32")
    assert check(program, config, dynamic=False)
    right = matmul.FORMS["addmm"]

    def forget(b, numerics, term, *rest):
        del numerics, rest
        return b.cast(term, torch.float32)

    monkeypatch.setitem(matmul.FORMS, "addmm", dataclasses.replace(right, rule=forget))
    with pytest.raises(AssertionError, match="addmm"):
        check(program, config, dynamic=False)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_packet_without_a_default_overload_passes_all_passes(precision):
    """The fault that stopped Mamba and masks made in a compiled function: `aten.slice`."""
    program = Program(
        "slice", torch.ops.aten.slice, (torch.randn(6, 4).bfloat16(), 0, 1, 5, 2), {}
    )
    assert check(program, HealConfig(precision=precision, outputs="fp32"), dynamic=False)
    assert check(program, HealConfig(precision=precision, outputs="fp32"), dynamic=True)
