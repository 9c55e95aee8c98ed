"""Speculative decoding in vLLM: accepted drafts leave the bits of the answer.

A file of its own: after an engine that drafts, vLLM 0.32 starts no other in the same process.
"""

from __future__ import annotations

from tests.support.engines import Engine, prompts


def test_drafts_of_ngrams(llama):
    """Long enough for the random model to repeat itself, which is when drafts are accepted."""
    given, sampling = prompts()[4:8], {"max_tokens": 48}
    with Engine(llama, sampling=sampling) as engine:
        expected = engine.alone(given)
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    arguments = {"speculative_config": speculative}
    with Engine(llama, sampling=sampling, arguments=arguments) as engine:
        answers = engine.together(given)
        accepted = engine.counted("vllm:spec_decode_num_accepted_tokens")
    print(f"{accepted} accepted drafts")
    assert answers == expected
    assert accepted > 0
