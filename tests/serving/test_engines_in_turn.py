"""Several engines in one process, one after another.

A file of its own: after a start that failed, vLLM 0.32 starts no other in the same process.
"""

from __future__ import annotations

from tests.support.engines import Engine, prompts, save_model


def test_each_gets_what_it_asked_for(tmp_path):
    """vLLM keeps the attention backend and the rotary tables of the engine before."""
    llama, given = save_model("llama", tmp_path), prompts()[3:6]
    with Engine(llama) as first:
        expected = first.together(given)
    with Engine(llama, "heal") as other:
        assert other.together(given) != expected
    with Engine(llama, None, arguments={"dtype": "float32"}) as plain:
        assert plain.together(given) != expected
    with Engine(llama, kv="int24") as finer:
        assert finer.together(given) != expected
    with Engine(llama) as again:
        assert again.together(given) == expected
