"""Configurations, plans and presets: what they accept, name and refuse."""

import json

import pytest

from healpass.errors import ConfigError, StudyError
from healpass.study.plan import presets
from healpass.study.plan.configuration import Axes, Configuration, StudyPlan, Unit


def test_a_name_is_unique_and_can_be_a_files():
    plan = presets.plan("standard", "any")
    names = [unit.name for unit in plan.units]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzAHVB0123456789-") for name in names)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_a_plan_survives_json(preset):
    plan = presets.plan(preset, "any")
    again = StudyPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.key == plan.key


def test_any_change_of_a_plan_changes_its_key():
    plan = presets.plan("quick", "any")
    other = presets.plan("quick", "any", prompts=plan.prompts + 1)
    assert plan.key != other.key


def test_a_v100_has_no_bf16():
    plan = presets.plan("standard", "any", {"precisions": ("bf16", "fp16")})
    reasons = {u.configuration.precision for u in plan.units if u.configuration.unavailable}
    assert reasons == {"bf16"}


def test_generations_that_add_alike_are_run_once():
    scored = Axes(precisions=("fp32", "heal")).scored()
    gpus = {p: [c.gpu for c in scored if c.precision == p and c.gpu] for p in ("fp32", "heal")}
    assert gpus == {"fp32": ["v100"], "heal": ["v100", "a100", "h100"]}


def test_text_comes_before_those_that_score_it():
    plan = presets.plan("standard", "any")
    for precision in plan.precisions:
        kinds = [u.kind for u in plan.units if u.configuration.precision == precision]
        assert kinds == sorted(kinds, key=["greedy", "sampled", "forced"].index)


def test_the_papers_study_has_twelve_configurations_of_each_precision():
    for preset, kind in (("layercast-study", "greedy"), ("overnight", "forced")):
        plan = presets.plan(preset, "any")
        for precision in plan.precisions:
            found = [c for c in getattr(plan, kind) if c.precision == precision]
            assert len(found) == 12
            assert {c.batch_size for c in found} == {8, 16, 32}


def test_a_simulated_gpu_scores_fewer_prompts_and_tokens():
    plan = presets.plan("standard", "any")
    scopes = {bool(u.configuration.gpu): plan.scope(u) for u in plan.units if u.kind == "forced"}
    assert scopes == {False: (8, 128), True: (4, 64)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "bf61"}, "Did you mean 'bf16'"),
        ({"precision": "heal", "gpu": "h1000"}, "gpu='h1000'"),
        ({"precision": "heal", "batch_size": 0}, "batch_size=0"),
        ({"precision": "heal", "chunk": 0}, "chunk=0"),
        ({"precision": "heal", "order": -1}, "order=-1"),
        ({"precision": "heal", "padding_side": "top"}, "padding_side='top'"),
    ],
)
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(StudyError, match=message):
        Configuration(**values)


def test_what_heal_refuses_is_refused():
    with pytest.raises(ConfigError, match="kv='fp32'"):
        Configuration(precision="exact", kv="fp32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"greedy": (Configuration(precision="heal"),) * 2}, "stands twice"),
        ({"forced": (Configuration(precision="bf16"),)}, "bf16 has no greedy"),
        ({"prompts": 0}, "prompts=0"),
    ],
)
def test_a_plan_without_sense_is_refused(changes, message):
    values = {"model": "any", "greedy": (Configuration(precision="heal"),)}
    with pytest.raises(StudyError, match=message):
        StudyPlan(**values | changes)


def test_an_unknown_preset_gets_a_suggestion():
    with pytest.raises(StudyError, match="Did you mean 'quick'"):
        presets.plan("quik", "any")


def test_what_is_asked_for_takes_the_place_of_the_presets_own():
    plan = presets.plan("quick", "any", {"batch_sizes": (1, 3), "orders": ()}, prompts=5)
    assert {c.batch_size for c in plan.greedy} == {1, 3}
    assert not any(c.order for c in plan.greedy)
    assert (plan.prompts, plan.max_new_tokens) == (5, 32)


def test_an_axis_needs_a_value():
    with pytest.raises(StudyError, match="batch_sizes is empty"):
        Axes(batch_sizes=())


def test_units_of_one_configuration_differ_by_kind():
    c = Configuration(precision="bf16")
    assert Unit("greedy", c).name != Unit("forced", c).name
