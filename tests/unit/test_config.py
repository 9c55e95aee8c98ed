"""HealConfig: strict parsing, errors that name the way out, a canonical key."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from healpass import Debug, HealConfig, HealError
from healpass.config import CHOICES, UNTOUCHED
from healpass.errors import ConfigError, suggestion

FIELDS = {field.name: field for field in dataclasses.fields(HealConfig)}
VALID = {
    "precision": "layercast",
    "kv": "fp32",
    "outputs": "fp32",
    "mode": "max-autotune",
    "strict": True,
}


@pytest.mark.parametrize("name", FIELDS)
@given(letter=st.sampled_from("abcxyz_"), position=st.integers(0, 20))
def test_a_misspelled_option_suggests_the_nearest_name(name, letter, position):
    wrong = name[: position % len(name)] + letter + name[position % len(name) :]
    with pytest.raises(ConfigError) as caught:
        HealConfig.read({wrong: 1})
    first = str(caught.value).split("\n")[0]
    assert repr(wrong) in first
    assert "Did you mean" in first
    assert name in str(caught.value)


@given(st.text(), st.none() | st.integers() | st.text())
def test_an_unknown_option_is_an_error_and_nothing_else(name, value):
    if name in FIELDS:
        return
    with pytest.raises(ConfigError, match="unknown option"):
        HealConfig.read({name: value})


@pytest.mark.parametrize("name", ["max_autotune", "epilogue_fusion", "triton.cudagraphs"])
def test_inductors_own_options_are_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match="Inductor's own options are not accepted"):
        HealConfig.read({name: True})


SCALARS = (st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
CONTAINERS = (st.lists(st.integers()), st.dictionaries(st.text(max_size=2), st.integers()))
ODD = st.one_of(*SCALARS, *CONTAINERS, st.binary(max_size=3), st.just(object()))


@pytest.mark.parametrize("name", FIELDS)
@given(value=ODD)
def test_any_value_is_accepted_in_its_domain_or_refused_by_name(name, value):
    refusal = ""
    try:
        accepted = getattr(HealConfig(**{name: value}), name)
    except HealError as error:
        refusal = str(error).split("\n")[0]
    if refusal:
        assert name in refusal
    elif name in CHOICES:
        assert accepted in CHOICES[name]
        assert not isinstance(accepted, bool)
    else:
        assert type(accepted) is type(FIELDS[name].default)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "hael"}, "Did you mean 'heal'"),
        ({"precision": 16}, "precision=16 is not one of"),
        ({"precision": None}, "precision=None is not one of"),
        ({"precision": ["heal"]}, "is not one of"),
        ({"kv": "int8"}, "is not one of"),
        ({"strict": 1}, "True or False is needed"),
        ({"strict": "yes"}, "True or False is needed"),
        ({"debug": {"order": True}}, "a whole number is needed"),
        ({"debug": {"order": 1.0}}, "a whole number is needed"),
        ({"debug": {"disable": 3}}, "disable"),
        ({"debug": {"disable": ("promote", 3)}}, "disable"),
        ({"debug": {"disable": "promote"}}, "a tuple of pass names is needed"),
        ({"debug": {"disable": {"promote"}}}, "a tuple of pass names is needed"),
        ({"mode": "fast"}, "is not one of"),
        ({"debug": {"simulat": "h100"}}, "Did you mean 'simulate'"),
        ({"debug": {"simulate": "h200"}}, "is not one of"),
        ({"debug": {"order": -1}}, "a seed of 0 or more is needed"),
        ({"debug": "h100"}, "a dict is needed"),
        ({"simulate": "h200"}, "simulate='h200' is not one of"),
        ({"disable": "promote"}, "a tuple of pass names is needed"),
        ({"precision": "bf16", "simulate": "h100"}, "precision='bf16' leaves them as they are"),
        ({"precision": "exact", "exact_accuracy": "highest"}, "Did you mean 'high'"),
        ({"exact_accuracy": "high"}, "needs precision='exact'"),
        ({"precision": "exact", "exact_accuracy": "high", "exact_products": 5}, "say the same"),
    ],
)
def test_a_wrong_value_says_what_is_needed(options, message):
    with pytest.raises(ConfigError, match=message):
        HealConfig.read(options)


def test_the_passes_to_disable_become_a_tuple():
    assert HealConfig(debug={"disable": ["promote", "matmul"]}).debug.disable == (
        "promote",
        "matmul",
    )


def test_the_mode_may_come_from_torch_or_from_the_options_but_must_agree():
    assert HealConfig.read({}, mode="max-autotune").mode == "max-autotune"
    assert HealConfig.read({"mode": "lite"}, mode=None).mode == "lite"
    assert HealConfig.read({"mode": "lite"}, mode="lite").mode == "lite"
    with pytest.raises(ConfigError, match="contradict each other"):
        HealConfig.read({"mode": "lite"}, mode="default")
    with pytest.raises(ConfigError, match="is not one of"):
        HealConfig.read(None, mode="faster")


def test_a_configuration_is_frozen_hashable_and_survives_pickling():
    config = HealConfig(**VALID)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.precision = "heal"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(HealConfig(**VALID))
    assert dataclasses.replace(config, kv=None).kv is None


@pytest.mark.parametrize("name", VALID)
def test_each_option_changes_the_key(name):
    assert HealConfig(**{name: VALID[name]}).key() != HealConfig().key()


def test_the_key_does_not_depend_on_the_order_of_the_options():
    backwards = dict(reversed(list(VALID.items())))
    assert HealConfig(**VALID).key() == HealConfig(**backwards).key()
    assert set(json.loads(HealConfig().key())) == set(FIELDS)


def test_only_the_baselines_leave_the_graph_alone():
    assert all(HealConfig(precision=p).rewrites for p in ("heal", "layercast", "exact"))
    assert not any(HealConfig(precision=p).rewrites for p in UNTOUCHED)


@given(st.text(), st.lists(st.text(), max_size=4))
def test_a_suggestion_is_one_of_the_known_names(name, known):
    text = suggestion(name, known)
    assert text == "" or any(repr(candidate) in text for candidate in known)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "int16"),
        ({"precision": "layercast"}, "fp32"),
        ({"kv": "int24"}, "int24"),
        ({"precision": "layercast", "kv": "int16"}, "int16"),
        ({"kv": "fp32"}, "fp32"),
    ],
)
def test_the_format_of_attention_follows_the_precision_unless_it_is_given(options, found):
    assert HealConfig(**options).attention_format == found


@pytest.mark.parametrize(("accuracy", "products"), [("low", 3), ("default", 5), ("high", 8)])
def test_accuracy_of_exact_by_name_or_by_number(accuracy, products):
    named = HealConfig(precision="exact", exact_accuracy=accuracy)
    numbered = HealConfig(precision="exact", exact_products=products)
    assert named.numerics == numbered.numerics == f"exact{products}"


WAYS = {
    "keywords": lambda **fields: HealConfig.read(**fields),
    "mapping": lambda **fields: HealConfig.read(fields),
    "HealConfig": lambda **fields: HealConfig.read(HealConfig(**fields)),
    "both": lambda precision, **rest: HealConfig.read({"precision": precision}, **rest),
    "debug options by name": lambda debug, **rest: HealConfig.read(rest, **debug),
    "what it changed": lambda **fields: HealConfig.read(HealConfig(**fields).changed()),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_give_options_means_the_same(way):
    fields = {"precision": "exact", "kv": "int24", "debug": {"simulate": "h100", "order": 2}}
    found = WAYS[way](**fields)
    assert found == HealConfig(**fields)
    assert found.debug == Debug(simulate="h100", order=2)
    assert json.loads(json.dumps(found.changed())) == fields | {
        "debug": {"simulate": "h100", "order": 2, "disable": []}
    }


def test_a_debug_option_that_is_given_twice_must_agree():
    assert HealConfig.read({"order": 2, "debug": {"order": 2}}).debug.order == 2
    assert HealConfig.read({"debug": {"order": 2}}, debug=Debug(order=2)).debug.order == 2
    assert HealConfig.read({"order": 2, "debug": {"simulate": "h100"}}).debug.simulate == "h100"
    for options in ({"order": 2, "debug": {"order": 3}}, {"order": 0, "debug": {"order": 3}}):
        with pytest.raises(ConfigError, match="contradict each other"):
            HealConfig.read(options)


def test_what_is_no_set_of_options_is_refused_with_the_way_to_call():
    with pytest.raises(ConfigError, match="second brackets"):
        HealConfig.read(torch.ones(2))
    with pytest.raises(ConfigError, match="contradict each other"):
        HealConfig.read({"kv": "int16"}, kv="int24")
    with pytest.raises(ConfigError, match="contradict each other"):
        HealConfig.read(HealConfig(mode="lite"), mode="default")
    assert HealConfig.read(HealConfig(kv="int16"), outputs="fp32").outputs == "fp32"
    assert HealConfig.read({"mode": None}, mode="default").mode == "default"
