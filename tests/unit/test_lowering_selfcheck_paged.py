"""The guard of the kernels over pages: it passes what is right, and names what is not."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from healpass.lowering.cuda import kernels, selfcheck_paged
from healpass.lowering.cuda.paged import PagedProblem, attend
from healpass.lowering.cuda.pages import Pages
from healpass.lowering.cuda.selfcheck_paged import ATTENDED, WRITE, PagedCheck
from healpass.ops.attention.paged import Cell, PagedAttention
from tests.support.attention_runs import Change, without_products_of
from tests.support.paged_runs import interpreted

heal = torch.ops.heal
MERGE = "attention_merge"
SHORT = next(check for check in selfcheck_paged.checks() if check.templates == ATTENDED)


def by_kernels(check: PagedCheck, change: Change | None = None) -> Tensor:
    """As on a GPU, in the interpreter."""

    def write(pages: Tensor, key: Tensor, value: Tensor, slots: Tensor, kv: str) -> None:
        Pages(pages, Cell(kv, key.shape[-1], value.shape[-1])).write(key, value, slots)

    def attended(*call: object) -> Tensor:
        return attend(PagedProblem(PagedAttention.read(*call), 90))

    with (
        interpreted(change) as names,
        mock.patch.object(heal, "paged_write", write),
        mock.patch.object(heal, "paged_attention", attended),
    ):
        found = check("cpu")
    assert set(check.templates) == set(names) - {MERGE}, "a check goes through what it names"
    return found


def test_the_reference_passes_and_every_template_is_examined():
    assert selfcheck_paged.examine(PagedCheck.reference) == {}
    examined = {name for check in selfcheck_paged.checks() for name in check.templates}
    assert examined == set(kernels.EAGER)


def test_the_kernels_pass():
    assert selfcheck_paged.examine(by_kernels) == {}


def test_the_kernels_of_a_short_check_pass_and_a_lost_piece_is_noticed():
    assert selfcheck_paged.examine(by_kernels, [SHORT]) == {}
    lost = without_products_of("v_low")
    wrong = selfcheck_paged.examine(lambda check: by_kernels(check, lost), [SHORT])
    assert set(wrong) == set(ATTENDED)


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, 0.0, 1.001])
def test_a_wrong_output_is_named(spoil):
    def wrong(check: PagedCheck) -> Tensor:
        return check.reference() if check.writes else check.reference() * spoil

    assert set(selfcheck_paged.examine(wrong)) == set(kernels.EAGER) - {WRITE}


def test_one_wrong_bit_and_one_wrong_byte_are_named():
    exact = next(check for check in selfcheck_paged.checks() if check.numerics == "exact5")
    writing = next(check for check in selfcheck_paged.checks() if check.writes)

    def bit(check: PagedCheck) -> Tensor:
        output = check.reference()
        output.view(torch.int8).view(-1)[-1] ^= 1
        return output

    found = selfcheck_paged.examine(bit, [exact])
    assert set(found) == set(exact.templates)
    assert "1 of" in found["paged_sums"]
    assert set(selfcheck_paged.examine(bit, [writing])) == {WRITE}
