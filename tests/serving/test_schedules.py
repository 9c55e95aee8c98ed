"""`precision="exact"` in vLLM: an answer has the same bits whatever the scheduler does.

Each row has its inverse: `precision="heal"`, or vLLM as it is, must differ in the same row
somewhere, or the row would show nothing.
"""

from __future__ import annotations

import pytest

from tests.support.engines import Engine, prompts, same

GIVEN = prompts()
ALL = len(GIVEN)


@pytest.fixture(scope="module")
def lonely(llama):
    """What each prompt is answered alone, from an empty cache."""
    with Engine(llama) as engine:
        return engine.alone(GIVEN)


def test_batches_and_arrivals(llama, lonely):
    with Engine(llama) as engine:
        for size in (2, 8, 16):
            assert engine.llm.reset_prefix_cache()
            answers = engine.together(GIVEN[:size])
            print(f"batch of {size}: {same(answers, lonely[:size])} of {size}")
            assert answers == lonely[:size]
        assert engine.llm.reset_prefix_cache()
        assert engine.staggered(GIVEN) == lonely


@pytest.mark.parametrize("precision", ["heal", None])
def test_other_arithmetic_differs_in_a_batch(llama, precision):
    """The inverse: the default precision promises no bits, and vLLM's BF16 has none to promise."""
    with Engine(llama, precision) as engine:
        alone = engine.alone(GIVEN)
        assert engine.llm.reset_prefix_cache()
        found = same(engine.together(GIVEN), alone)
    print(f"{precision or 'BF16'}: {found} of {ALL}")
    assert found < ALL


@pytest.mark.parametrize("tokens", [8, 16, 64])
def test_prefill_in_chunks(llama, lonely, tokens):
    arguments = {"max_num_batched_tokens": tokens, "max_num_seqs": min(tokens, 16)}
    with Engine(llama, arguments=arguments) as engine:
        assert engine.together(GIVEN) == lonely


def test_prefixes_that_are_cached(llama, lonely):
    with Engine(llama, arguments={"block_size": 16}) as engine:
        assert engine.together(GIVEN) == lonely
        before = engine.counted("vllm:prefix_cache_hits")
        assert engine.together(GIVEN) == lonely
        hits = engine.counted("vllm:prefix_cache_hits") - before
    print(f"{hits} tokens of the second round were cached")
    assert hits >= 16
    with Engine(llama, arguments={"enable_prefix_caching": False}) as engine:
        assert engine.together(GIVEN) == lonely


@pytest.mark.parametrize("size", [16, 32, 128])
def test_sizes_of_blocks(llama, lonely, size):
    with Engine(llama, arguments={"block_size": size}) as engine:
        assert engine.together(GIVEN) == lonely


def test_preempted_requests(llama, lonely):
    arguments = {"block_size": 16, "num_gpu_blocks_override": 18}
    with Engine(llama, arguments=arguments) as engine:
        assert engine.together(GIVEN) == lonely
        count = engine.counted("vllm:num_preemptions")
    print(f"{count} preemptions")
    assert count > 0


def test_seeded_samples(llama):
    sampling = {"temperature": 0.9, "top_p": 0.9, "top_k": 50}
    with Engine(llama, sampling=sampling) as engine:
        alone = engine.alone(GIVEN)
        assert engine.llm.reset_prefix_cache()
        assert engine.together(GIVEN) == alone
    assert len({tokens for tokens, _ in alone}) == ALL


def test_int24_pages(llama, lonely):
    with Engine(llama, kv="int24") as engine:
        alone = engine.alone(GIVEN)
        assert engine.llm.reset_prefix_cache()
        assert engine.together(GIVEN) == alone
    assert same(alone, lonely) < ALL  # other pages, other bits
