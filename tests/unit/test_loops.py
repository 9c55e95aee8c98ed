"""`lowering.cpu.loops`: kernels whose vectors would run across rows that share a buffer."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor
from torch._inductor import metrics

import healpass
from healpass.backend import inductor_patches
from healpass.lowering.cpu.loops import SeparateLoops
from tests.support.bits import differing
from tests.support.rewriting import Rewritten

EPS = torch.finfo(torch.float32).eps


def weights(scores: Tensor, row: Tensor, column: Tensor, mask: Tensor) -> Tensor:
    """As attention with a scale per key: `column` is strided along the keys, `row` contiguous
    along the queries, and what `exp` makes is read twice."""
    grown = torch.exp(scores * row.unsqueeze(-1) * row.unsqueeze(1))
    largest = torch.where(mask, grown, 0.0).amax(-1, keepdim=True)
    scale = column.t().repeat_interleave(2, 0).unsqueeze(1)
    top = torch.where(mask, scale, 0.0).amax(-1, keepdim=True)
    return torch.where(mask, (grown / largest) * (scale / top), 0.0)


def operands(length: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, length, length, generator=generator)
    row, column = (torch.rand(shape, generator=generator) for shape in ((4, length), (length, 2)))
    return scores, row, column + 1, torch.ones(length, length, dtype=torch.bool).tril()


def is_right(compiled, length: int) -> bool:
    """Within the roundings: 2 of the exponent times its size, 1 ulp of exp and 4 more, twice."""
    given = operands(length)
    truth = weights(*(x if x.dtype == torch.bool else x.double() for x in given))
    exponent = (given[0] * given[1].unsqueeze(-1) * given[1].unsqueeze(1)).abs()
    budget = 2 * (2 * exponent.amax(-1, keepdim=True) + 5) * EPS * truth
    error = (compiled(*given).double() - truth).abs()
    print(f"length {length}: observed/bound {float((error / budget).nan_to_num().max()):.2f}")
    return bool((error <= budget).all())


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("precision", ["heal", "exact"])
def test_rows_do_not_read_each_others_values(precision, dynamic):
    options = {"precision": precision}
    compiled = torch.compile(weights, backend="heal", options=options, dynamic=dynamic)
    for length in (10, 16, 40):
        assert is_right(compiled, length)


def test_plain_inductor_mixes_rows():
    """The inverse: without the pass the fault is there. A later torch may have mended it."""
    with inductor.patch(fx_graph_cache=False):
        right = is_right(torch.compile(weights, dynamic=True), 10)
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert not right or release > (2, 13)


def test_other_joined_loops_stay_joined():
    """A softmax hands its rows on in a buffer of one row, and still does."""
    counts = []
    for backend in ("inductor", "heal"):
        torch._dynamo.reset()
        metrics.reset()
        with inductor.patch(fx_graph_cache=False):
            compiled = torch.compile(lambda x: torch.softmax(x.sin() * 2, -1), backend=backend)
            compiled(torch.randn(8, 64))
        joined = metrics.cpp_outer_loop_fused_inner_counts
        counts.append([count.local_buffer_number for count in joined])
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 0


class Chained:
    """A pass of the user's, in the slot of ours."""

    def __init__(self, key: str | None) -> None:
        self.key, self.seen = key, 0

    def __call__(self, nodes: list) -> list:
        self.seen += len(nodes)
        return nodes

    def uuid(self) -> str | None:
        return self.key


def test_the_pass_of_a_user_runs_and_counts_in_the_key():
    theirs = Chained("theirs")
    with inductor.patch(_post_fusion_custom_pass=theirs, fx_graph_cache=False):
        ours = inductor_patches(healpass.HealConfig())["_post_fusion_custom_pass"]
        torch.compile(lambda x: x + 1, backend="heal")(torch.ones(3))
    assert theirs.seen == 1
    assert ours.uuid() not in (None, SeparateLoops().uuid())
    assert SeparateLoops(Chained(None)).uuid() is None
    assert SeparateLoops(lambda nodes: nodes).uuid() is None
    assert SeparateLoops().uuid() == SeparateLoops().uuid()


def attend(x: Tensor, mask: Tensor) -> Tensor:
    """Q, K and V as models make them: `[B, L, H, E]` transposed, Q and K rotated."""
    batch, length = x.shape[:2]
    q, k, v = (x * scale for scale in (1.0, 0.7, 1.3))
    q, k, v = (s.view(batch, length, -1, 16).transpose(1, 2) for s in (q, k, v))
    q, k = (torch.cat([-s[..., 8:], s[..., :8]], -1) + s for s in (q, k))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k[:, ::2], v[:, ::2], enable_gqa=True, attn_mask=mask
    )


def test_exact_attention_of_strided_projections_has_the_reference_bits():
    """V's scale is strided along the keys and Q's contiguous along the queries: a window of four
    keys, whose rows all read the last row's scores without the pass."""
    x = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(10, 10, dtype=torch.bool).tril().triu(-3)
    reference = Rewritten(attend, healpass.HealConfig(precision="exact"))(x, mask)
    torch._dynamo.reset()
    options = {"precision": "exact"}
    compiled = torch.compile(attend, backend="heal", options=options, dynamic=False)
    assert differing(compiled(x, mask), reference) == 0
