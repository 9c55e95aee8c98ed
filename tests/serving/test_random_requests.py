"""Sixty-four requests that come and go as they like, and a cache too small for them.

Each is answered with the bits of its lonely answer: tokens, log-probabilities and those of its
prompt. What an aborted request heard until then is how its lonely answer begins.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings

from tests.support.engines import Engine
from tests.support.loads import alone, loads, together

COUNT = 64
#: Room for one prompt of 90 tokens and a little, so that requests are preempted.
SMALL = {"max_model_len": 112, "block_size": 16, "num_gpu_blocks_override": 10}
CHUNKS = {"max_num_batched_tokens": 48}


def tried(engine: Engine, seeded: bool) -> tuple[list[int], list[int]]:
    """Loads: how many requests of each heard something else than alone, and were aborted."""
    wrong, aborted = [], []

    # An example takes seconds: few, and none is shrunk.
    @settings(max_examples=3, phases=[Phase.generate])
    @given(loads(COUNT, seeded))
    def whatever_arrives(load):
        lonely, found = alone(engine, load), together(engine, load)
        pairs = list(zip(found, lonely, strict=True))
        wrong.append(sum(not heard.begins(whole) for heard, whole in pairs))
        aborted.append(sum(heard != whole for heard, whole in pairs) - wrong[-1])
        left = [request for request, heard in zip(load, found, strict=True) if not heard.finished]
        assert all(request.stays is not None for request in left)

    whatever_arrives()
    return wrong, aborted


# (vLLM 0.32 takes no seeded request's prompt in chunks on a CPU, whose generators have no offset.)
@pytest.mark.parametrize(
    ("seeded", "budget"), [(True, {}), (False, CHUNKS)], ids=["seeded", "chunks"]
)
def test_each_answer_is_the_lonely_one(llama, seeded, budget):
    with Engine(llama, arguments=SMALL | budget) as engine:
        wrong, aborted = tried(engine, seeded)
        preempted = engine.counted("vllm:num_preemptions")
        hits = engine.counted("vllm:prefix_cache_hits")
    print(f"wrong {wrong}, aborted {aborted}, {preempted} preemptions, {hits} tokens cached")
    assert not any(wrong)
    assert min(preempted, hits, sum(aborted)) > 0


#: The same room in blocks that vLLM's own attention takes.
LARGER = {"max_model_len": 112, "block_size": 32, "num_gpu_blocks_override": 5}


@pytest.mark.parametrize(("precision", "room"), [("heal", SMALL), (None, LARGER)])
def test_other_arithmetic_answers_otherwise(llama, precision, room):
    with Engine(llama, precision, arguments=room) as engine:
        wrong, _ = tried(engine, seeded=True)
    print(f"{precision or 'BF16'}: {wrong} of {COUNT}")
    assert any(wrong)
