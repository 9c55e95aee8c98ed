"""Engines in processes of their own: other numbers of threads, and two ranks."""

from __future__ import annotations

import pytest

from tests.support.engines import Engine, elsewhere, prompts, same, save_model

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
