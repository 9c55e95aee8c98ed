"""Records on disk: whole or absent, gone on with, and refused when damaged."""

import errno
import json
import math
import os

import pytest
import torch

from healpass.errors import StudyError
from healpass.study.judge.anatomy import Anatomy
from healpass.study.judge.blame import Blame, Deviation
from healpass.study.judge.contributions import Contribution
from healpass.study.plan.configuration import Configuration, StudyPlan
from healpass.study.run.records import Answer, Batch, Scores, Store, digest_of, read_plan
from healpass.study.run.traces import Sketch

GREEDY = Configuration(precision="bf16", batch_size=2)
PLAN = StudyPlan(model="any", greedy=(GREEDY,), forced=(GREEDY,), prompts=3)
UNIT, FORCED = PLAN.units


def answer(*tokens):
    return Answer("q", tokens, (0.5,) * len(tokens), "text", None, False)


def scores(length):
    logits = torch.arange(length * 3.0).reshape(length, 3)
    top = torch.zeros(length, 2, dtype=torch.int64)
    return Scores(top, logits[:, :2], logits[:, :2], logits[:, 0], digest_of(logits))


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "study", PLAN, {"command": "c", "environment": {}})


def test_answers_come_back_as_they_were(store):
    store.save_answers(UNIT, 0, Batch((answer(4, 5), answer()), 1.5))
    store.save_answers(UNIT, 2, Batch((answer(7),), 0.5))
    assert store.answers(UNIT) == [answer(4, 5), answer(), answer(7)]
    assert [batch.seconds for batch in store.batches(UNIT)] == [1.5, 0.5]
    assert store.is_complete(UNIT)


NO_JSON = (math.nan, math.inf, -math.inf)


def test_what_is_not_finite_is_valid_json_and_comes_back(store):
    odd = Answer("q", (4, 5, 6), NO_JSON, "Infinity", "NaN", False)
    store.save_answers(UNIT, 0, Batch((odd,), math.inf))
    written = (store.folder / "runs" / UNIT.name / "00000.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail)["answers"][0]["text"] == "Infinity"
    (found,) = store.batches(UNIT)
    assert found.seconds == math.inf
    assert list(map(str, found.answers[0].top1_probs)) == ["nan", "inf", "-inf"]
    assert (found.answers[0].text, found.answers[0].answer) == ("Infinity", "NaN")


def test_an_anatomy_of_nothing_but_infinities_comes_back(store):
    blame = Blame(GREEDY, GREEDY, tuple(Deviation("m:f", x, x) for x in NO_JSON))
    sketch = Sketch("0", math.inf, NO_JSON)
    parts = tuple(Contribution("norms", x) for x in NO_JSON)
    path = store.save_json("a.json", Anatomy("bf16", (blame,), {"m": sketch}, parts).to_dict())
    json.loads(path.read_text(), parse_constant=pytest.fail)
    found = Anatomy.from_dict(store.load_json("a.json"))
    assert list(map(repr, (found.blames[0], found.trace["m"], found.contributions))) == list(
        map(repr, (blame, sketch, parts))
    )


@pytest.mark.parametrize("length", [0, 1, 5])
def test_scores_come_back_as_they_were(store, length):
    store.save_scores(FORCED, 0, [scores(length), scores(2)])
    first, second = store.scores(FORCED)
    for name in ("top", "logits", "reference", "probs", "digest"):
        assert torch.equal(getattr(first, name), getattr(scores(length), name))
        assert torch.equal(getattr(second, name), getattr(scores(2), name))
    assert not store.is_complete(FORCED)


def test_a_study_is_not_overwritten_by_accident(store):
    with pytest.raises(StudyError, match="--resume"):
        Store.open(store.folder, PLAN, {})
    assert read_plan(store.folder) == PLAN
    assert Store.open(store.folder, PLAN, {}, resume=True).plan == PLAN


def test_another_study_is_not_gone_on_with(store):
    other = StudyPlan(model="any", greedy=(GREEDY,), forced=(GREEDY,), prompts=2)
    with pytest.raises(StudyError, match="its prompts differ"):
        Store.open(store.folder, other, {}, resume=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"answers": 3}', b"\xff\xfe"])
def test_a_damaged_record_is_named_and_nothing_else_is_lost(store, content):
    store.save_answers(UNIT, 0, Batch((answer(4), answer(5)), 1.0))
    store.save_answers(UNIT, 2, Batch((answer(6),), 1.0))
    path = store.folder / "runs" / UNIT.name / "00002.json"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=r"00002.json is damaged") as error:
        store.done(UNIT)
    assert "--resume" in str(error.value)
    path.unlink()
    assert store.answers(UNIT) == [answer(4), answer(5)]


def test_no_answer_moves_up_where_a_record_is_missing(store):
    """What stands behind a gap belongs to later prompts: it counts when the gap is filled."""
    store.save_answers(UNIT, 2, Batch((answer(7),), 1.0))
    store.save_scores(FORCED, 2, [scores(2)])
    assert store.answers(UNIT) == []
    assert store.scores(FORCED) == []
    assert [store.holds(unit, start) for unit in (UNIT, FORCED) for start in (0, 2)] == [
        *(False, True),
        *(False, True),
    ]
    store.save_answers(UNIT, 0, Batch((answer(4), answer(5)), 1.0))
    assert store.answers(UNIT) == [answer(4), answer(5), answer(7)]
    assert store.is_complete(UNIT)


def test_damaged_scores_and_plans_are_named(store):
    store.save_scores(FORCED, 0, [scores(2)])
    (store.folder / "runs" / FORCED.name / "00000.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(StudyError, match="safetensors is damaged"):
        store.scores(FORCED)
    (store.folder / "plan.json").write_text("{}")
    with pytest.raises(StudyError, match=r"plan.json is damaged"):
        read_plan(store.folder)


def test_a_full_disk_leaves_no_half_file(store, monkeypatch):
    store.save_answers(UNIT, 0, Batch((answer(4), answer(5)), 1.0))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StudyError, match="No space left") as error:
        store.save_answers(UNIT, 2, Batch((answer(6),), 1.0))
    assert "--resume" in str(error.value)
    files = sorted(p.name for p in (store.folder / "runs" / UNIT.name).iterdir())
    assert files == ["00000.json"]
    assert store.done(UNIT) == 2


def test_what_a_kill_leaves_behind_is_not_taken_for_a_record(store):
    folder = store.folder / "runs" / UNIT.name
    folder.mkdir(parents=True)
    (folder / "00000.json.partial").write_text('{"answers": [')
    assert store.done(UNIT) == 0


def test_a_digest_tells_bits_apart_but_not_the_sign_of_zero():
    x = torch.tensor([0.0, 1.0])
    assert torch.equal(digest_of(x), digest_of(torch.tensor([-0.0, 1.0])))
    next_up = torch.nextafter(x, torch.tensor(2.0))
    assert not torch.equal(digest_of(x), digest_of(next_up))


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(StudyError, match="holds no study"):
        read_plan(tmp_path)
