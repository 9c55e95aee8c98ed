"""Each metric of arXiv 2506.09501 against values worked out by hand, and the degenerate cases."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healpass.errors import StudyError
from healpass.study.judge.metrics import agreement_by_position, compute_metrics, div_index
from healpass.study.run.records import Output

#: Two prompts, three configurations. Prompt 0 parts at 2 and has three outputs, of 3, 4 and 2
#: tokens; prompt 1 has one output everywhere.
RUNS = {
    "bs 1": [Output((5, 6, 7), (0.5, 0.5, 0.9), True), Output((1, 2), (0.25, 1.0), True)],
    "bs 8": [
        Output((5, 6, 8, 9), (0.75, 0.5, 0.1, 0.1), False),
        Output((1, 2), (0.25, 1.0), True),
    ],
    "bs 16": [Output((5, 6), (1.0, 0.5), False), Output((1, 2), (0.25, 1.0), True)],
}


def test_every_metric_has_its_value_by_hand():
    metrics = compute_metrics(RUNS)
    assert metrics.configurations == ("bs 1", "bs 8", "bs 16")
    assert metrics.prompts == 2
    assert metrics.div_index == (2, -1)
    assert metrics.mean_div_index == 2
    assert metrics.div_percent == 50
    assert metrics.unique_outputs == (3, 1)
    # Lengths 3, 4, 2: mean 3, deviations 0, 1, -1, sample variance 2 / 2. Then (1 + 0) / 2.
    assert metrics.avg_std_output_length == 0.5
    # Position 0: 0.5, 0.75, 1 deviates by 0.25; position 1 by 0; prompt 0: 0.125; prompt 1: 0.
    assert metrics.avg_std_top1_prob == 0.0625
    assert metrics.accuracy == {"bs 1": 100, "bs 8": 50, "bs 16": 50}
    # Mean 200/3, deviations 100/3, -50/3, -50/3, sample variance 15000/9 / 2.
    assert metrics.std_acc == math.sqrt(15000 / 18)


def test_the_first_divergence_is_named():
    first = compute_metrics(RUNS).first_divergence
    assert (first.prompt, first.position) == (0, 2)
    assert first.tokens == {"bs 1": 7, "bs 8": 8, "bs 16": None}


def test_the_earliest_divergence_is_first_whatever_the_order_of_prompts():
    late, early = Output((1, 2, 3)), Output((1, 9, 3))
    runs = {"a": [late, late, late], "b": [Output((1, 2, 4)), early, early]}
    metrics = compute_metrics(runs)
    assert (metrics.first_divergence.prompt, metrics.first_divergence.position) == (1, 1)
    assert [d.prompt for d in metrics.divergences] == [0, 1, 2]
    assert metrics.mean_div_index == 4 / 3


def test_the_papers_names_and_json():
    table = compute_metrics(RUNS).to_dict()
    assert json.loads(json.dumps(table)) == table
    assert {
        "Div_Index", "Div_Percent", "Avg_Std@top1_prob", "Std@Acc", "Avg_Std@Output_Length"
    } <= set(table)  # fmt: skip
    assert table["First_Divergence"]["tokens"]["bs 16"] is None


def test_no_divergence_gives_exact_zeros():
    """0.1 three times has a mean one ulp beside it: a deviation from the mean would not be 0."""
    same = [
        Output((1, 2), (0.1, 0.7), True),
        Output((3,), (0.1,), False),
        Output((4,), (1 / 3,), True),
    ]
    metrics = compute_metrics(dict.fromkeys("abcdef", same))
    assert metrics.div_index == (-1, -1, -1)
    assert metrics.unique_outputs == (1, 1, 1)
    assert metrics.first_divergence is None
    assert metrics.mean_div_index is None
    assert metrics.to_dict()["First_Divergence"] is None
    zeros = (metrics.div_percent, metrics.avg_std_top1_prob, metrics.std_acc)
    assert (*zeros, metrics.avg_std_output_length) == (0, 0, 0, 0)
    assert agreement_by_position(metrics, 3) == (1, 1, 1, 1)


def test_an_ulp_in_one_probability_is_seen():
    near = {"a": [Output((1,), (0.5,))], "b": [Output((1,), (0.5 + 2**-53,))]}
    assert compute_metrics(near).avg_std_top1_prob == 2**-53 * math.sqrt(0.5)


def test_one_configuration_compares_nothing():
    metrics = compute_metrics({"only": RUNS["bs 1"]})
    assert metrics.div_index == (-1, -1)
    assert metrics.unique_outputs == (1, 1)
    assert metrics.accuracy == {"only": 100}
    assert metrics.div_percent is None
    assert metrics.avg_std_top1_prob is None
    assert metrics.std_acc is None
    assert metrics.avg_std_output_length is None
    with pytest.raises(StudyError, match="needs two configurations"):
        agreement_by_position(metrics, 1)


def test_one_prompt():
    metrics = compute_metrics({name: outputs[:1] for name, outputs in RUNS.items()})
    assert metrics.div_percent == 100
    assert metrics.avg_std_output_length == 1
    assert metrics.avg_std_top1_prob == 0.125
    assert metrics.std_acc == math.sqrt(30000 / 9)  # 100, 0, 0


def test_no_prompt():
    metrics = compute_metrics({"a": [], "b": []})
    assert (metrics.prompts, metrics.div_index) == (0, ())
    assert metrics.div_percent is metrics.avg_std_output_length is metrics.std_acc is None


def test_empty_outputs():
    empty, word = Output(()), Output((7,), (0.5,))
    both = compute_metrics({"a": [empty], "b": [empty]})
    assert both.div_index == (-1,)
    assert both.avg_std_top1_prob is None, "no position has a probability"
    one = compute_metrics({"a": [empty], "b": [word]})
    assert one.div_index == (0,)
    assert one.avg_std_top1_prob is None, "no position lies before the divergence"
    assert one.avg_std_output_length == math.sqrt(0.5)
    assert one.first_divergence.tokens == {"a": None, "b": 7}


def test_a_prompt_that_parts_at_once_has_no_part_in_the_probabilities():
    apart = {"a": [Output((1,), (0.1,)), Output((3,), (0.25,))],
             "b": [Output((2,), (0.9,)), Output((3,), (0.75,))]}  # fmt: skip
    assert compute_metrics(apart).avg_std_top1_prob == math.sqrt(0.125)


def test_prompts_without_a_checkable_answer_have_no_part_in_accuracy():
    runs = {"a": [Output((1,)), Output((1,), correct=True)],
            "b": [Output((1,)), Output((2,), correct=False)]}  # fmt: skip
    metrics = compute_metrics(runs)
    assert metrics.accuracy == {"a": 100, "b": 0}
    assert metrics.std_acc == math.sqrt(5000)
    assert compute_metrics({"a": [Output((1,))], "b": [Output((1,))]}).accuracy is None


def test_nothing_right_is_an_accuracy_of_zero_not_none():
    metrics = compute_metrics({name: [Output((1,), correct=False)] for name in "ab"})
    assert metrics.accuracy == {"a": 0, "b": 0}
    assert metrics.std_acc == 0


def test_agreement_by_position_falls_after_each_divergence():
    """Prompt 0 parts at 2: the first two tokens agree, the first three do not."""
    assert agreement_by_position(compute_metrics(RUNS), 4) == (1, 1, 1, 0.5, 0.5)


@pytest.mark.parametrize(
    ("outputs", "index"),
    [
        ([], -1),
        ([[]], -1),
        ([[], []], -1),
        ([[], [1]], 0),
        ([[1], [1]], -1),
        ([[1], [2]], 0),
        ([[1, 2], [1]], 1),
        ([[1, 2, 3], [1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 9, 3], [1, 2, 4]], 1),
    ],
)
def test_div_index(outputs, index):
    assert div_index(outputs) == index


SHORT = st.lists(st.integers(0, 1), max_size=6)


@given(st.lists(SHORT, min_size=1, max_size=4))
def test_div_index_is_the_end_of_the_longest_common_start(outputs):
    index = div_index(outputs)
    assert (index == -1) == (len({tuple(o) for o in outputs}) == 1)
    assert index == div_index(outputs[::-1])
    if index >= 0:
        assert len({tuple(o[:index]) for o in outputs}) == 1
        assert len({tuple(o[: index + 1]) for o in outputs}) > 1


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "at least one configuration"),
        ({"a": [Output((1,))], "b": []}, "different numbers of prompts: {'a': 1, 'b': 0}"),
        ({"a": [Output((1,), correct=True)], "b": [Output((1,))]}, "checked in 1 of 2"),
        ({"a": [Output((1,), (0.5,))], "b": [Output((1,))]}, "recorded in 1 of 2"),
    ],
)
def test_what_does_not_fit_together_is_refused(runs, message):
    with pytest.raises(StudyError, match=message):
        compute_metrics(runs)


def test_probabilities_of_other_tokens_are_refused():
    with pytest.raises(StudyError, match="2 tokens but 1 top-1"):
        Output((1, 2), (0.5,))
