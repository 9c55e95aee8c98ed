"""Engines in processes of their own: other threads, another instruction set, two ranks."""

from __future__ import annotations

import pytest
import torch

from healpass.integrations.frequencies import PinnedFunctions
from tests.support.engines import Engine, elsewhere, prompts, rope, same, save_model

GIVEN = prompts()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("even", tmp_path_factory.mktemp("even"))


@pytest.fixture(scope="module")
def expected(model):
    with Engine(model) as engine:
        return engine.together(GIVEN)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_numbers_of_threads(model, expected, threads):
    assert elsewhere(model, {"OMP_NUM_THREADS": threads}) == expected


@pytest.fixture(scope="module")
def without_vectors(tmp_path_factory):
    """A model whose frequencies torch's powers round differently; its answers without vectors."""
    model = save_model(rope("default"), tmp_path_factory.mktemp("frequencies"))
    return model, elsewhere(model, {"ATEN_CPU_CAPABILITY": "default"})


def test_another_instruction_set(without_vectors):
    model, expected = without_vectors
    with Engine(model) as engine:
        assert engine.together(GIVEN) == expected


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="this processor has one power only",
)
def test_another_instruction_set_without_the_pin(without_vectors, monkeypatch):
    """The inverse: torch's power makes the frequencies."""
    powers = {operator: kept for operator, kept in PinnedFunctions.PINNED.items()
              if "pow" not in str(operator)}  # fmt: skip
    monkeypatch.setattr(PinnedFunctions, "PINNED", powers)
    model, expected = without_vectors
    with Engine(model) as engine:
        assert engine.together(GIVEN) != expected


TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_two_ranks_add_integers(model, expected):
    """vLLM starts the ranks, which find the plugin by its entry point."""
    assert elsewhere(model, {"OMP_NUM_THREADS": "1"}, arguments=TWO_RANKS) == expected


def test_two_ranks_of_the_default_precision_differ(model):
    """The inverse: floats that ranks add come in another order."""
    with Engine(model, "heal") as engine:
        one = engine.together(GIVEN)
    two = elsewhere(model, {"OMP_NUM_THREADS": "1"}, precision="heal", arguments=TWO_RANKS)
    found = same(two, one)
    print(f"heal on two ranks: {found} of {len(GIVEN)}")
    assert found < len(GIVEN)
