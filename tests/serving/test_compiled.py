"""The model's graph through `backend="heal"` has the bits of the layers by themselves."""

from __future__ import annotations

import pytest

from tests.support.engines import Engine, prompts, save_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def test_the_compiled_graph_has_the_bits_of_the_layers(llama):
    given = prompts()
    with Engine(llama) as engine:
        expected = engine.together(given)
    with Engine(llama, compiled=True) as engine:
        assert engine.together(given) == expected
        assert engine.alone(given[:4]) == expected[:4]
