"""`healpass check` from end to end on a tiny model: verdicts, blame, resuming, wrong use."""

import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from healpass import cli
from healpass.errors import HealError
from healpass.integrations.checkpoint import Checkpoint
from healpass.study import check
from healpass.study.judge.blame import Session, blame
from healpass.study.judge.contributions import (
    ALL,
    KINDS,
    PIECES,
    all_of_heal,
    contributions,
    independent,
)
from healpass.study.plan import presets
from healpass.study.plan.configuration import Configuration, StudyPlan
from healpass.study.plan.prompts import chat, encode
from healpass.study.plan.tasks import Task
from healpass.study.run import runner
from healpass.study.run.records import Store
from tests.support.study_models import make_checkpoint, make_encoder, make_tokenizer, write_tasks

QUESTIONS = ["How many?", "Which share of the whole is it?", "What remains after a year?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks.jsonl", QUESTIONS * 2)


def healpass(*arguments):
    return CliRunner().invoke(cli.app, ["check", *map(str, arguments)])


@pytest.fixture(scope="module")
def bf16(model, tasks, tmp_path_factory):
    """The study of BF16, and its folder."""
    folder = tmp_path_factory.mktemp("study") / "out"
    options = ["--preset", "quick", "--precision", "bf16", "--tasks", tasks, "--out", folder]
    options += ["--prompts", "6", "--max-new-tokens", "160", "--json"]
    return healpass(model, *options), folder, [model, *options]


def test_bf16_is_not_reproducible(bf16):
    result, folder, _ = bf16
    assert result.exit_code == 1, result.output
    (found,) = json.loads(result.stdout)["precisions"]
    assert found["reproducible"] is False
    assert found["bit_identical"] is False
    assert found["prediction"]["rate"] > 0
    assert found["domains"]["other"]["Accuracy"] == found["greedy"]["Accuracy"]
    assert (folder / "report.html").exists()


def test_a_finished_study_is_evaluated_again_without_the_model(bf16, monkeypatch):
    result, _, arguments = bf16
    monkeypatch.setattr(runner, "build", None)
    again = healpass(*arguments, "--resume")
    assert json.loads(again.stdout) == json.loads(result.stdout)


def test_the_page_needs_no_network_and_tells_how_to_repeat_it(bf16):
    _, folder, _ = bf16
    page = (folder / "report.html").read_text()
    assert page.count("<figure>") == 4
    assert "What each rounding contributes" in page
    assert "Where answers part" in page
    # A namespace is a name and not an address that a browser asks for.
    asked = page.replace("http://www.w3.org/", "").replace("https://matplotlib.org", "")
    assert not [word for word in ("src=", "@import", "<script", "<link") if word in asked]
    stamp = json.loads((folder / "plan.json").read_text())
    assert stamp["environment"]["packages"]["torch"] == torch.__version__
    assert {p.name for p in (folder / "plots").iterdir()} == {
        f"{name}.{kind}"
        for name in ("survival", "depth", "margins", "cost")
        for kind in ("svg", "png")
    }


def test_a_study_compared_with_itself_does_not_differ(bf16):
    report = bf16[1] / "report.json"
    result = CliRunner().invoke(cli.app, ["diff", str(report), str(report)])
    assert result.exit_code == 0, result.output


def plan_of(model, tasks, precision, **changes):
    """One batch to generate, three configurations to score, nothing compiled by Inductor."""
    c = Configuration(precision=precision)
    values = {
        "model": str(model),
        "greedy": (dataclasses.replace(c, batch_size=2),),
        "forced": (c, dataclasses.replace(c, batch_size=2), dataclasses.replace(c, order=1)),
        "tasks": str(tasks),
        "prompts": 2,
        "max_new_tokens": 6,
        "compiled": False,
    }
    return StudyPlan(**values | changes)


def test_exact_is_reproducible_bit_for_bit(model, tasks, tmp_path):
    request = check.Request(tmp_path / "out", "command", quiet=True)
    result = check.check(plan_of(model, tasks, "exact"), request, Console(quiet=True))
    assert result.exit_code == 0
    assert result.precisions[0].identical is True
    assert check.summary(result).startswith("Reproducible")


class Faulty(Checkpoint):
    """One operation is off by a thousandth as soon as there is a batch."""

    def model(self, dtype="bfloat16"):
        model = super().model(dtype)

        def off(module, args, output):
            return output * 1.001 if output.shape[0] > 1 else output

        model.model.layers[1].mlp.down_proj.register_forward_hook(off)
        return model


TEXT = list(range(10, 40))


@pytest.mark.parametrize("precision", ["fp32", "heal"])
def test_a_planted_fault_is_named(model, precision):
    one = Configuration(precision=precision)
    batch = dataclasses.replace(one, batch_size=4)
    order = dataclasses.replace(one, order=1)
    (faulty, reordered), _ = blame(Session(Faulty(str(model)), TEXT), one, [batch, order])
    assert faulty.suspect.operation == "model.layers.1.mlp.down_proj"
    # The fault itself, and FP32 roundings of a value in 48 terms beside it.
    assert abs(faulty.suspect.own - 1e-3) <= 2 * 48 * 2**-24
    assert reordered.suspect is None
    assert reordered.first is not None


def test_check_names_a_planted_fault(model, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Checkpoint", Faulty)
    c = Configuration(precision="fp32")
    batch = dataclasses.replace(c, batch_size=2)
    plan = plan_of(model, tasks, "fp32", greedy=(c, batch), forced=(c, batch))
    out = io.StringIO()
    result = check.check(
        plan, check.Request(tmp_path / "out", "", quiet=True), Console(quiet=True)
    )
    check.show(result, Console(file=out, width=200), tmp_path)
    assert "SUSPECT: model.layers.1.mlp.down_proj" in out.getvalue()
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<span class="suspect">model.layers.1.mlp.down_proj</span>' in page


def test_each_rounding_contributes_less_than_all_together(model):
    parts = contributions(Session(Checkpoint(str(model)), TEXT), "bf16")
    found = {c.kind: c.error for c in parts}
    assert set(found) == {*KINDS, ALL}
    assert all(error > 0 for error in found.values())
    # Roundings to BF16 are independent of each other: squares add up, give or take.
    assert max(found[kind] for kind in KINDS) < found[ALL]
    assert independent(parts) == pytest.approx(math.dist([found[kind] for kind in KINDS], [0] * 5))


def test_each_format_of_heals_cache_has_its_share(model):
    """A step of INT16 is 2^8 steps of INT24, which are finer than FP32's own roundings."""
    parts = contributions(Session(Checkpoint(str(model)), TEXT), "heal")
    found = {c.kind: c.error for c in parts}
    int16, int24 = (found[f"Q, K and V in {name}"] for name in ("INT16", "INT24"))
    assert int24 > 0
    assert found[PIECES] > 0
    print(f"INT16 / INT24 = {int16 / int24:.0f}: 256 steps, less what FP32 itself rounds")
    assert max(int24, found[PIECES]) < int16
    whole = [found[all_of_heal(kv)] for kv in ("fp32", "int24", "int16")]
    assert whole[0] < whole[2]
    assert whole[1] < whole[2]
    assert independent(parts) is None
    assert contributions(Session(Checkpoint(str(model)), TEXT), "exact") == []


def test_what_was_interrupted_goes_on_behind_the_last_batch(model, tasks, tmp_path):
    plan = plan_of(model, tasks, "bf16", greedy=(Configuration(precision="bf16"),), forced=())
    store = Store.open(tmp_path / "study", plan, {})
    materials = runner.gather(plan)

    def interrupt(unit, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(store, materials, interrupt)
    (unit,) = plan.units
    assert store.done(unit) == 1
    first = (tmp_path / "study" / "runs" / unit.name / "00000.json").read_bytes()
    steps = []
    runner.run(store, materials, lambda _, done: steps.append(done))
    assert steps == [2]
    assert (tmp_path / "study" / "runs" / unit.name / "00000.json").read_bytes() == first


def test_ctrl_c_says_how_to_go_on(model, tasks, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "run", interrupted)
    result = healpass(
        model, "--preset", "quick", "--tasks", tasks, "--prompts", 2, "--out", tmp_path
    )
    assert result.exit_code == 130
    assert "--resume" in result.output


def test_a_sample_depends_on_its_request_only(model, tasks, tmp_path):
    sampled = (Configuration(precision="fp32"), Configuration(precision="fp32", batch_size=2))
    plan = plan_of(model, tasks, "fp32", sampled=sampled, greedy=sampled[:1], forced=())
    store = Store.open(tmp_path / "study", plan, {})
    runner.run(store, runner.gather(plan))
    one, two = (store.answers(u) for u in plan.units if u.kind == "sampled")
    assert [a.tokens for a in one] == [a.tokens for a in two]
    assert [a.tokens for a in one] != [a.tokens for a in store.answers(plan.units[0])]


# Wrong use


def refused(*arguments):
    result = healpass(*arguments)
    assert result.exit_code == 2, result.output
    return result.output


def test_a_model_that_is_not_there(tmp_path):
    assert "cannot load" in refused(tmp_path / "none", "--out", tmp_path / "out")
    assert "there is no file" in refused(tmp_path / "a.gguf", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(tmp_path):
    folder = make_checkpoint(tmp_path / "model", tokenizer=False)
    assert "as a tokenizer" in refused(folder, "--out", tmp_path / "out")


def test_an_encoder(tmp_path):
    folder = make_encoder(tmp_path / "model")
    assert "is a BertForMaskedLM" in refused(folder, "--out", tmp_path / "out")


def test_a_prompt_longer_than_the_context(tmp_path, tasks):
    folder = make_checkpoint(tmp_path / "model", context=64)
    text = refused(folder, "--tasks", tasks, "--prompts", 2, "--out", tmp_path / "out")
    assert "the model's context holds 64" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "bf61"], "Did you mean 'bf16'"),
        (["--batch-sizes", "1,x"], "--batch-sizes '1,x'"),
        (["--gpus", "a1000"], "gpu='a1000'"),
        (["--preset", "fast"], "preset 'fast' is unknown"),
        (["--tasks", "none.jsonl"], "cannot read the tasks"),
        (["--prompts", "500"], "has 68"),
        (["--prompts", "0"], "prompts"),
        (["--precision", ","], "precisions is empty"),
    ],
)
def test_an_option_that_makes_no_sense(arguments, message, tmp_path):
    text = refused("any", *arguments, "--out", tmp_path / "out")
    assert message in " ".join(text.split())


def test_a_damaged_record_stops_the_study_and_keeps_the_rest(model, tasks, tmp_path):
    options = [model, "--preset", "quick", "--precision", "fp32", "--tasks", tasks]
    options += ["--prompts", 2, "--max-new-tokens", 2, "--out", tmp_path / "out"]
    sizes = {"tasks": str(tasks), "prompts": 2, "max_new_tokens": 2}
    plan = presets.plan("quick", str(model), {"precisions": ("fp32",)}, **sizes)
    Store.open(tmp_path / "out", plan, {"command": "", "environment": {}})
    record = tmp_path / "out" / "runs" / plan.units[0].name / "00000.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    text = " ".join(refused(*options, "--resume").split())
    assert "00000.json is damaged" in text
    assert record.read_text() == "{"


def test_the_date_of_a_chat_template_is_pinned():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ date_string }}|{{ strftime_now('%d %b %Y') }}|{{ messages[0]['content'] }}"
    )
    assert chat(tokenizer, "x") == "26 Jul 2024|26 Jul 2024|x"


def test_an_empty_prompt_is_refused(model):
    def silent(*_, **__):
        return {"input_ids": []}

    task = Task(id="q", kind="number", question="?", answer="1", tolerance="0")
    with pytest.raises(HealError, match="no tokens"):
        encode(Checkpoint(str(model)).model(), silent, [task], 1)
