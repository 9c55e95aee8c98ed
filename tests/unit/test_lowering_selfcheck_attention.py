"""The guard against miscompiled attention kernels: it passes what is right, names what is not."""

from __future__ import annotations

import pytest
import torch

from healpass.lowering.cuda import kernels, selfcheck_attention
from healpass.lowering.cuda.selfcheck_attention import AttentionCheck
from tests.support.attention_runs import Change, run, without_products_of


def exact(check: AttentionCheck) -> tuple[torch.Tensor, ...]:
    return tuple(result.float() for result, _ in selfcheck_attention.promises(check))


def reference(check: AttentionCheck) -> tuple[torch.Tensor, ...]:
    """The operators' own FP32 arithmetic."""
    name, call = check.request()
    return tuple(getattr(torch.ops.heal, name)(*call))


def interpreted(check: AttentionCheck, change: Change | None = None) -> tuple[torch.Tensor, ...]:
    """The generated kernels, in the interpreter."""
    name, call = check.request()
    return tuple(run(getattr(torch.ops.heal, name), list(call), change=change))


def test_right_results_pass():
    assert selfcheck_attention.examine(exact) == {}
    assert selfcheck_attention.examine(reference) == {}
    assert selfcheck_attention.examine(interpreted) == {}


def test_every_attention_template_is_examined():
    examined = {name for check in selfcheck_attention.checks() for name in check.templates}
    assert examined == {name for name in kernels.GRIDS if name.startswith("attention")}


def test_a_lost_piece_is_noticed_in_every_template():
    change = without_products_of("v_low")
    wrong = selfcheck_attention.examine(lambda check: interpreted(check, change))
    assert {"attention", *selfcheck_attention.BACKWARD} <= set(wrong)


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, 0.0, 1.001])
def test_a_wrong_result_is_named(position, spoil):
    backward = position >= 2

    def wrong(check: AttentionCheck) -> tuple[torch.Tensor, ...]:
        results = list(exact(check))
        if check.backward == backward:
            results[position - 2 if backward else position] *= spoil
        return tuple(results)

    forward = {selfcheck_attention.FORWARD, selfcheck_attention.MERGE}
    blamed = set(selfcheck_attention.BACKWARD) if backward else forward
    assert set(selfcheck_attention.examine(wrong)) == blamed
