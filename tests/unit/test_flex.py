"""FlexAttention becomes heal::sdpa where its functions allow, and is kept with a reason else."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from healpass.config import HealConfig
from healpass.graph.nodes import heal_name
from tests.support.rewriting import Rewritten

L, S = 150, 200
DOCUMENTS = torch.arange(S) // 60


def causal(b, h, q, kv):
    return q >= kv


def sliding(b, h, q, kv):
    return (q >= kv) & (q - kv < 40) | (kv == h)


def documents(b, h, q, kv):
    return (DOCUMENTS[q] == DOCUMENTS[kv]) & (q >= kv)


def soft_cap(score, b, h, q, kv):
    return 2.0 * torch.tanh(score / 2.0)


def bias(score, b, h, q, kv):
    return score + 0.01 * (q - kv)


def blocks_alone():
    """A block mask whose blocks hide what its function does not."""
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, seq_lengths=(L, S))


def run(score_mod, mask_mod, config, heads=4):
    torch.manual_seed(0)
    query = torch.randn(2, heads, L, 16)
    key, value = torch.randn(2, 2, S, 16), torch.randn(2, 2, S, 16)
    block_mask = mask_mod
    if callable(mask_mod) and not isinstance(mask_mod, BlockMask):
        block_mask = create_block_mask(mask_mod, None, heads, L, S, device="cpu")

    def function(query, key, value):
        return flex_attention(
            query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=True
        )

    compiled = Rewritten(function, config)
    with torch.no_grad():
        exact = function(query.double(), key.double(), value.double())
        return compiled, compiled(query, key, value), exact


MASKS = {"none": None, "causal": causal, "sliding": sliding, "documents": documents}


@pytest.mark.parametrize("score_mod", [None, soft_cap], ids=["plain", "soft_cap"])
@pytest.mark.parametrize("mask", MASKS)
def test_it_is_rewritten_and_right(mask, score_mod):
    config = HealConfig(outputs="fp32", kv="int24")
    compiled, found, exact = run(score_mod, MASKS[mask], config)
    assert not compiled.kept
    names = [heal_name(node) for node in compiled.graphs[0].graph.nodes]
    assert names.count("heal::sdpa") == 1
    assert ("heal::listed_blocks" in names) == (mask != "none")
    assert (found - exact).norm() <= 2.0**-20 * exact.norm()


def test_blocks_that_are_not_listed_hide_their_keys():
    """As FlexAttention's kernels have it; its eager form looks at the function alone."""
    block_mask = blocks_alone()
    compiled, found, _ = run(None, block_mask, HealConfig(outputs="fp32", kv="int24"))
    assert not compiled.kept
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 16) for h, n in ((4, L), (2, S), (2, S)))
    dense = block_mask.to_dense().bool().repeat_interleave(128, 2).repeat_interleave(128, 3)
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), dense[:, :, :L, :S], enable_gqa=True
    )
    assert (found - exact).norm() <= 2.0**-20 * exact.norm()


def modulo_of_sum(b, h, q, kv):
    return (q + kv).sum() % 2 == 0


@pytest.mark.parametrize(
    ("score_mod", "mask_mod", "reason"),
    [
        (bias, None, "its score_mod does more than a soft cap"),
        (None, modulo_of_sum, "its mask_mod computes sum, which is not elementwise"),
    ],
    ids=["score", "mask"],
)
def test_what_it_cannot_express_is_kept_with_the_reason(score_mod, mask_mod, reason):
    compiled, found, exact = run(score_mod, mask_mod, HealConfig())
    assert compiled.kept == {"flex_attention": f"FlexAttention: {reason}"}
    assert (found - exact).norm() <= 2.0**-18 * exact.norm()
