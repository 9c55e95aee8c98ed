"""Rows in which plain vLLM happens to agree on a CPU: they notice a fault that is planted.

In place of `heal::paged_attention` stands attention that adds products in FP64, part by part, and
the parts in FP32, in the order of chunks or of pages. So bits depend on what was
cached, or on the size of a block, by a rounding or two.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from healpass.integrations.vllm import attention
from healpass.ops.attention.paged import Cell
from tests.support.engines import Engine, prompts, same

GIVEN = prompts()


def parts_of_chunks(before, keys, room):
    """What was in the pages before this step, and what it brought."""
    return [slice(0, before), slice(before, keys)]


def parts_of_pages(before, keys, room):
    """Page by page."""
    return [slice(start, start + room) for start in range(0, keys, room)]


def faulty(parts):
    """`heal::paged_attention` for causal attention, which adds `parts` in FP32."""

    def attend(query, pages, starts, lengths, blocks, *rest):
        _, is_causal, scale, window, softcap, value_size, kv, _ = rest
        assert (is_causal, window, softcap) == (True, None, None)
        cell, room = Cell(kv, query.shape[-1], value_size), pages.shape[2]
        output = query.new_zeros(*query.shape[:2], value_size)
        for number, keys in enumerate(lengths.tolist()):
            rows = slice(*starts[number : number + 2].tolist())
            own = blocks[number, : -(-keys // room)].long()
            cells = pages[own].transpose(0, 1).flatten(1, 2)[:, :keys]
            key, value = (
                states.dequantized()[0].double().repeat_interleave(query.shape[1] // len(cells), 0)
                for states in cell.unpack(cells)
            )
            before = keys - (rows.stop - rows.start)
            scores = query[rows].transpose(0, 1).double() @ key.mT * scale
            unseen = torch.arange(keys) > torch.arange(before, keys)[:, None]
            weights = scores.masked_fill(unseen, -math.inf).softmax(-1)
            total = torch.zeros(())
            for part in parts(before, keys, room):
                total = total + (weights[..., part] @ value[:, part]).float()
            output[rows] = total.transpose(0, 1)
        return output

    return attend


@pytest.fixture
def planted(monkeypatch):
    """Plants a fault in the engines of this test."""

    def plant(parts):
        theirs = attention.heal
        fault = SimpleNamespace(paged_write=theirs.paged_write, paged_attention=faulty(parts))
        monkeypatch.setattr(attention, "heal", fault)

    return plant


def test_prefix_hits_notice_a_sum_in_the_order_of_chunks(llama, planted):
    planted(parts_of_chunks)
    with Engine(llama, arguments={"block_size": 16}) as engine:
        miss = engine.together(GIVEN)
        hit = engine.together(GIVEN)
        assert engine.counted("vllm:prefix_cache_hits") > 0
    print(f"sums in the order of chunks: {same(hit, miss)} of {len(GIVEN)} after a hit")
    assert hit != miss


def test_sizes_of_blocks_notice_a_sum_in_the_order_of_pages(llama, planted):
    planted(parts_of_pages)
    answers = []
    for size in (16, 32, 128):
        with Engine(llama, arguments={"block_size": size}) as engine:
            answers.append(engine.together(GIVEN))
    found = [same(other, answers[0]) for other in answers[1:]]
    print(f"sums in the order of pages: {found} of {len(GIVEN)} in blocks of 32 and 128 as of 16")
    assert max(found) < len(GIVEN)


def test_chunks_of_a_prompt_notice_a_sum_in_the_order_of_chunks(llama, planted):
    planted(parts_of_chunks)
    with Engine(llama) as engine:
        whole = engine.together(GIVEN)
    with Engine(llama, arguments={"max_num_batched_tokens": 16}) as engine:
        cut = engine.together(GIVEN)
    print(f"sums in the order of chunks: {same(cut, whole)} of {len(GIVEN)} in chunks of 16")
    assert cut != whole
