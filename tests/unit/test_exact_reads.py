"""Trained reads under `precision="exact"`: their gradients are sums that are rounded once."""

from __future__ import annotations

import pytest
import torch

from healpass.config import HealConfig
from tests.support.bits import differing
from tests.support.rewriting import Rewritten

CONFIG = HealConfig(precision="exact", outputs="fp32")
#: The same rewriting without the pass `exact`.
SINGLE = HealConfig(outputs="fp32")

_GENERATOR = torch.Generator().manual_seed(0)
TABLE = torch.randn(9, 4, generator=_GENERATOR)
IDS = torch.randint(0, 4, (300,), generator=_GENERATOR)
PLACES = torch.randint(0, 4, (9, 300), generator=_GENERATOR)

#: Every element that is read at all is read many times.
READS = {
    "index_select": lambda t: t.index_select(0, IDS),
    "index_select columns": lambda t: torch.index_select(t, -1, IDS),
    "index": lambda t: t[IDS],
    "index from the end": lambda t: t[-IDS],
    "index of two dimensions": lambda t: t[IDS.reshape(30, 10)],
    "index columns": lambda t: t[:, IDS],
    "index last": lambda t: t[..., IDS.reshape(30, 10)],
    "index of pairs": lambda t: t[IDS * 2, -IDS],
    "take": lambda t: t.take(IDS * 3),
    "gather": lambda t: t.gather(1, PLACES),
    "gather of fewer rows": lambda t: torch.gather(t, dim=-1, index=PLACES[:3]),
    "gather down": lambda t: t.gather(0, PLACES.mT.contiguous()[:, :4]),
    "take_along_dim": lambda t: torch.take_along_dim(t, -PLACES, dim=1),
    "take_along_dim, flat": lambda t: torch.take_along_dim(t, IDS),
    "repeat": lambda t: t.repeat(5, 30, 2),
    "tile": lambda t: t.tile(300),
    "tile by a tuple": lambda t: torch.tile(t, (2, 100, 3)),
    "repeat_interleave": lambda t: t.repeat_interleave(300, dim=-1),
    "repeat_interleave, flat": lambda t: torch.repeat_interleave(t, 300),
}


def weights(like: torch.Tensor) -> torch.Tensor:
    """Integers of up to 32 bits, as numbers of 13: FP32 rounds their sums, 40 bits do not."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(-(1 << 12), 1 << 12, like.shape, generator=generator)
    steps = torch.randint(0, 20, like.shape, generator=generator)
    return torch.ldexp(numbers.to(torch.float32), steps)


def gradient(function, config: HealConfig, dtype: torch.dtype = torch.float32) -> tuple:
    """Of the table; and the call, with its report."""
    torch._dynamo.reset()
    table = TABLE.to(dtype).requires_grad_()
    call = Rewritten(lambda t: function(t) * 1.0, config, aot=True)
    result = call(table)
    assert differing(result.detach(), function(TABLE.to(dtype)).to(result.dtype)) == 0
    (found,) = torch.autograd.grad(result, table, weights(result).to(result.dtype))
    return found, call


def in_fp64(function, incoming: torch.dtype = torch.float32) -> torch.Tensor:
    """The right gradient: FP64 holds these sums."""
    table = TABLE.double().requires_grad_()
    result = function(table)
    given = weights(result).to(incoming).double()
    return torch.autograd.grad(result, table, given)[0].float()


@pytest.mark.parametrize("name", READS)
def test_the_gradient_of_a_read_is_its_sum_rounded_once(name):
    found, call = gradient(READS[name], CONFIG)
    assert call.kept == {}
    assert differing(found, in_fp64(READS[name]) + 0.0) == 0


@pytest.mark.parametrize("name", ["index_select", "index", "gather", "repeat"])
def test_a_float_sum_shows(name):
    """The inverse: without the pass, torch adds in FP32."""
    found, _ = gradient(READS[name], SINGLE)
    assert differing(found, in_fp64(READS[name])) > 0


def test_the_gradient_of_a_table_in_16_bits_is_summed_exactly_and_rounded_once():
    found, call = gradient(READS["index"], CONFIG, torch.bfloat16)
    assert call.kept == {}
    wanted = in_fp64(READS["index"])  # what comes in is FP32, as what was handed out
    assert differing(found, wanted.to(torch.bfloat16)) == 0


STAYING = {
    "slices": lambda t: t[1:, ::2] + t[2, :2],
    "a mask": lambda t: t[torch.tensor([True, False] * 4 + [True])],
}


@pytest.mark.parametrize("name", STAYING)
def test_what_reads_once_stays(name):
    _, call = gradient(STAYING[name], CONFIG)
    assert call.kept == {}


LISTED = {
    "an index behind an index": lambda t: t[:, IDS][1:, None][[0, 0, 1]],
    "counts in a tensor": lambda t: t.repeat_interleave(torch.arange(9), 0, output_size=36),
    "an overlapping view": lambda t: t.unfold(0, 3, 1),
    "several dimensions behind a slice": lambda t: t[None][:, IDS, IDS],
}


@pytest.mark.parametrize("name", LISTED)
def test_a_read_without_a_rule_is_listed(name):
    _, call = gradient(LISTED[name], CONFIG)
    assert any("read more than once" in reason for reason in call.kept.values()), call.kept


@pytest.mark.parametrize("name", ["index", "gather", "repeat"])
def test_nothing_changes_where_nothing_is_trained(name):
    torch._dynamo.reset()
    call = Rewritten(READS[name], CONFIG)
    assert differing(call(TABLE), READS[name](TABLE)) == 0
    assert call.kept == {}
    assert "heal::" not in str(call.graphs[0].graph).replace("heal::canonical", "")


@pytest.mark.deep
def test_sizes_may_be_symbols():
    """One compile for every number of tokens, and the bits of the compiles that know it."""

    def function(table, ids):
        rows = table[ids].gather(1, ids[..., None].remainder(5).expand(-1, -1, 4))
        return rows.repeat(1, 2, 1) * rows.take(ids.flatten()).sum()

    call = torch.compile(function, backend="heal", dynamic=True, options={"precision": "exact"})
    torch._dynamo.reset()
    for batch, length in ((2, 5), (3, 7)):
        ids = torch.arange(batch * length).remainder(9).reshape(batch, length)
        found = []
        for run in (call, Rewritten(function, CONFIG, aot=True)):
            table = TABLE.clone().requires_grad_()
            result = run(table, ids)
            found.append(torch.autograd.grad(result, table, weights(result)))
        assert differing(*found) == 0
