"""What vLLM counts for a page is what HEAL's cells take, to the byte."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from healpass.integrations.vllm.attention import BACKENDS


@pytest.mark.parametrize(("kv", "bytes_per_element"), [("int16", 4), ("int24", 6)])
@pytest.mark.parametrize(("block", "heads", "size"), [(16, 3, 64), (128, 8, 80)])
def test_bytes_of_a_page(kv, bytes_per_element, block, heads, size):
    spec = FullAttentionSpec(
        block_size=block, num_kv_heads=heads, head_size=size, dtype=torch.float32
    )
    made = BACKENDS[kv].customize_spec(spec)
    assert made.page_size_bytes == block * heads * (bytes_per_element * size + 8)
    assert BACKENDS[kv].customize_spec(made) == made
