"""From records to a verdict: metrics, shifts, exit codes, cost and the tables."""

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console

from healpass.study.check import show
from healpass.study.judge.results import evaluate
from healpass.study.plan.configuration import Configuration, StudyPlan
from healpass.study.plan.tasks import Task
from healpass.study.report.tables import span
from healpass.study.run.records import Answer, Batch, Store
from healpass.study.run.score import scores_of


def configuration(precision="fp32", **changes):
    return Configuration(precision=precision, **changes)


ONE, TWO = configuration(), configuration(batch_size=2)
PROMPTS = 4


def answers(*tokens):
    return Batch(tuple(Answer("q", t, (0.5,) * len(t), "", None, False) for t in tokens), 2.0)


SAME = answers((3, 4), (5,), (3,), (6, 7))
OTHER = answers((3, 4), (5,), (4,), (6, 7))


def make(folder, **changes):
    plan = {"model": "any", "greedy": (ONE, TWO), "prompts": PROMPTS, "max_new_tokens": 2}
    return Store.open(folder, StudyPlan(**plan | changes), {})


def filled(folder, *batches, **changes):
    store = make(folder, **changes)
    greedy = [unit for unit in store.plan.units if unit.kind == "greedy"]
    for unit, batch in zip(greedy, batches, strict=False):
        store.save_answers(unit, 0, batch)
    return store


def printed(store, tasks=()):
    out = io.StringIO()
    show(evaluate(store, tasks), Console(file=out, width=200), store.folder)
    return out.getvalue()


def test_the_same_answers_everywhere_exit_with_0(tmp_path):
    store = filled(tmp_path, SAME, SAME)
    result = evaluate(store)
    assert result.precisions[0].reproducible is True
    assert result.exit_code == 0
    assert result.precisions[0].generated.div_percent == 0
    assert "Reproducible: every configuration" in printed(store)


def test_one_other_answer_exits_with_1(tmp_path):
    store = filled(tmp_path, SAME, OTHER)
    result = evaluate(store)
    assert result.precisions[0].reproducible is False
    assert result.exit_code == 1
    assert result.precisions[0].generated.div_percent == 25
    assert "Not shown to be reproducible: fp32" in printed(store)


#: Two tasks of finance, one of each other domain.
TASKS = tuple(
    Task(id=f"q{i}", kind="number", question="?", answer="1", tolerance="0", domain=domain)
    for i, domain in enumerate(("finance", "medicine", "law", "finance"))
)


def rights(*correct):
    """One token per task, the same everywhere; whether each answer is right."""
    found = [Answer(f"q{i}", (3,), (0.5,), "", None, c) for i, c in enumerate(correct)]
    return Batch(tuple(found), 2.0)


FEW = rights(True, False, False, False)


def test_accuracy_is_told_by_domain_for_each_precision(tmp_path):
    """Finance: 1 of 2 and 2 of 2 right, so 50 and 100 %, which deviate by 50 / sqrt(2)."""
    store = filled(tmp_path, rights(True, True, False, False), rights(True, True, False, True))
    result = evaluate(store, TASKS)
    found = result.to_dict()["precisions"][0]["domains"]
    assert found == {
        "finance": {
            "prompts": 2,
            "Accuracy": {ONE.label: 50, TWO.label: 100},
            "Std@Acc": math.sqrt(50**2 / 2),
            "Div_Percent": 0,
        },
        "medicine": {
            "prompts": 1,
            "Accuracy": {ONE.label: 100, TWO.label: 100},
            "Std@Acc": 0,
            "Div_Percent": 0,
        },
        "law": {
            "prompts": 1,
            "Accuracy": {ONE.label: 0, TWO.label: 0},
            "Std@Acc": 0,
            "Div_Percent": 0,
        },
    }
    text = printed(store, TASKS)
    (row,) = (line for line in text.splitlines() if "50 to 100 %" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["50 to 100 %", "100 %", "0 %"]
    assert "finance, 2 prompts" in text


def test_one_domain_is_no_table_and_an_unknown_task_no_domain(tmp_path):
    store = filled(tmp_path, SAME, SAME)
    assert evaluate(store, TASKS).domains == evaluate(store).domains == {}
    alike = [dataclasses.replace(task, domain="other") for task in TASKS]
    alone = filled(tmp_path / "one", FEW, FEW)
    assert evaluate(alone, alike).domains == {"other": 4}
    assert "by domain" not in printed(alone, alike)


def test_a_domain_that_an_unfinished_precision_has_not_reached_is_a_dash(tmp_path):
    greedy = (ONE, TWO, configuration("bf16"), configuration("bf16", batch_size=2))
    store = filled(
        tmp_path,
        rights(True, False, False, False),
        rights(True, False, False, False),
        greedy=greedy,
    )
    (row,) = (x for x in printed(store, TASKS).splitlines() if x.count(" - ") == 3 and "bf16" in x)
    assert [cell.strip() for cell in row.split("│")[1:5]] == ["bf16", "-", "-", "-"]


def test_one_configuration_shows_nothing(tmp_path):
    result = evaluate(filled(tmp_path, SAME, greedy=(ONE,)))
    assert result.precisions[0].reproducible is None
    assert result.exit_code == 1


def test_an_unfinished_study_shows_differences_but_not_their_absence(tmp_path):
    three = (ONE, TWO, configuration(batch_size=3))
    same = evaluate(filled(tmp_path / "same", SAME, SAME, greedy=three)).precisions[0]
    assert same.reproducible is None
    assert same.missing == ("greedy-fp32-batch3",)
    other = evaluate(filled(tmp_path / "other", SAME, OTHER, greedy=three)).precisions[0]
    assert other.reproducible is False


def test_every_precision_asked_for_has_to_hold(tmp_path):
    greedy = (ONE, TWO, configuration("bf16"), configuration("bf16", batch_size=2))
    assert evaluate(filled(tmp_path / "a", SAME, SAME, SAME, SAME, greedy=greedy)).exit_code == 0
    assert evaluate(filled(tmp_path / "b", SAME, SAME, SAME, OTHER, greedy=greedy)).exit_code == 1


def logits(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, 9, generator=generator)


def scored(folder, noise):
    """Answers that are the reference's best tokens, and a second configuration beside it."""
    rows = [logits(prompt, 2) for prompt in range(PROMPTS)]
    same = answers(*(tuple(row.argmax(-1).tolist()) for row in rows))
    store = filled(folder, same, same, forced=(ONE, TWO), forced_prompts=PROMPTS)
    one, two = (unit for unit in store.plan.units if unit.kind == "forced")
    references = [scores_of(row) for row in rows]
    others = [scores_of(row + noise, ref) for row, ref in zip(rows, references, strict=True)]
    store.save_scores(one, 0, references)
    store.save_scores(two, 0, others)
    return store


def test_equal_logits_are_identical_and_predict_no_flip(tmp_path):
    store = scored(tmp_path, torch.zeros(9))
    found = evaluate(store).precisions[0]
    assert found.identical is True
    assert found.prediction.rate == 0
    assert found.prediction.agreement(16_000).chance == 1
    assert "yes, bit for bit" in printed(store)


def test_a_flip_on_given_text_counts_even_where_answers_agree(tmp_path):
    noise = torch.zeros(9)
    noise[4] = 50.0
    found = evaluate(scored(tmp_path, noise)).precisions[0]
    assert found.generated.div_percent == 0
    assert found.reproducible is False
    assert found.identical is False
    assert found.shifts[0].measured > 0


def test_what_no_hardware_runs_is_said_and_not_missed(tmp_path):
    greedy = (configuration("bf16"), configuration("bf16", batch_size=2))
    forced = (configuration("bf16", gpu="v100"),)
    store = filled(tmp_path, SAME, SAME, greedy=greedy, forced=forced)
    found = evaluate(store).precisions[0]
    assert found.missing == ()
    assert found.reproducible is True
    assert "a V100 has no BF16 tensor core" in printed(store)


def test_cost_leaves_out_the_batch_that_compiles(tmp_path):
    greedy = (ONE, configuration("bf16"))
    store = make(tmp_path, greedy=greedy, max_new_tokens=1)
    for unit, seconds in zip(store.plan.units, (1.0, 3.0), strict=True):
        store.save_answers(unit, 0, Batch(answers((3,)).answers, 100.0))
        store.save_answers(unit, 1, Batch(answers((3,), (4,), (5,)).answers, seconds))
    result = evaluate(store)
    assert result.cost("fp32") == 1
    assert result.cost("bf16") == pytest.approx(3)


def test_a_machine_that_slept_does_not_count(tmp_path):
    greedy = (ONE, configuration("bf16"))
    store = make(tmp_path, greedy=greedy, max_new_tokens=1)
    for unit, slept in zip(store.plan.units, (0.0, 3600.0), strict=True):
        for start, seconds in enumerate((9.0, 1.0, 1.0 + slept, 1.0)):
            store.save_answers(unit, start, Batch(answers((3,)).answers, seconds))
    assert evaluate(store).cost("bf16") == 1


def test_what_is_not_finished_is_listed_by_precision(tmp_path):
    store = filled(tmp_path, SAME, greedy=(ONE, TWO, configuration(batch_size=3)))
    assert "not finished: fp32: greedy-fp32-batch2, greedy-fp32-batch3" in printed(store)


def test_a_span_of_percentages():
    assert span({"batch 1": 5.0, "batch 8": 10.0, "batch 16": 5.0}) == "5 to 10 %"
    assert span({"batch 1": 12.5}) == "12.5 %"
    assert span(None) == "-"


@pytest.mark.parametrize("compiled", [True, False])
def test_what_ran_node_by_node_has_no_cost(tmp_path, compiled):
    greedy = (ONE, configuration("heal"), configuration("heal", order=1))
    store = make(tmp_path, greedy=greedy, max_new_tokens=1, compiled=compiled)
    for unit, seconds in zip(store.plan.units, (1.0, 2.0, 50.0), strict=True):
        store.save_answers(unit, 0, Batch(answers((3,)).answers, 100.0))
        store.save_answers(unit, 1, Batch(answers((3,), (4,), (5,)).answers, seconds))
    cost = evaluate(store).cost("heal")
    assert cost == (pytest.approx(2) if compiled else None)


def test_results_are_json(tmp_path):
    import json

    text = json.dumps(evaluate(scored(tmp_path, torch.zeros(9))).to_dict())
    assert json.loads(text)["precisions"][0]["bit_identical"] is True
