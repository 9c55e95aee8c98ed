"""The model's graph through `backend="heal"` has the bits of the layers by themselves."""

from __future__ import annotations

from tests.support.engines import Engine, prompts


def test_the_compiled_graph_has_the_bits_of_the_layers(llama):
    given = prompts()
    with Engine(llama) as engine:
        expected = engine.together(given)
    with Engine(llama, compiled=True) as engine:
        assert engine.together(given) == expected
        assert engine.alone(given[:4]) == expected[:4]
