"""The example that compares precisions: how it counts, and its short run."""

from __future__ import annotations

import pytest
import torch

from tests.support.examples import load_example


@pytest.fixture(scope="module")
def example():
    return load_example("exact_everywhere")


def test_answers_are_counted_per_prompt(example):
    runs = [[[1, 2], [3, 4]], [[1, 2], [3, 5]], [[1, 2], [9, 4]]]
    assert example.distinct(runs) == [1, 3]
    assert example.first_difference(runs) == 1
    assert example.first_difference(runs[:2]) == 2
    assert example.first_difference(runs[:1]) is None


def test_a_zero_of_the_other_sign_is_a_differing_bit(example):
    assert example.differing(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == 1


def test_a_cut_model_keeps_its_widths(example):
    assert example.SHORT.layers == 2
    assert len({str(how) for how in example.CONFIGURATIONS}) == 6


@pytest.mark.model
@pytest.mark.deep
def test_the_short_run_finds_one_answer_for_exact(example, capsys):
    example.main(["--short"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "exact" in line]
    assert "3 of 3" in lines[0]
    assert "none" in lines[0]
    assert lines[-1].split()[3:8:2] == ["0", "0", "0"]
