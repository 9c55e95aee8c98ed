"""The big presets to their end on a tiny model; simulated GPUs on layers of a real one."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from healpass import cli
from healpass.integrations import smollm2
from tests.support.study_models import make_checkpoint, write_tasks

QUESTIONS = ["How many?", "Which share of the whole is it?"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks.jsonl", QUESTIONS)


def study(model, tasks, folder, *options):
    """What `healpass check --json` prints, without the times, and its exit status."""
    arguments = ["check", model, "--tasks", tasks, "--out", folder, "--json", *options]
    result = CliRunner().invoke(cli.app, [str(word) for word in arguments])
    assert result.exit_code in (0, 1), result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    for precision in found["precisions"]:
        del precision["seconds_per_token"], precision["relative_cost"]
    return found, result.exit_code


@pytest.mark.parametrize(
    ("preset", "kind"), [("layercast-study", "greedy"), ("overnight", "forced")]
)
def test_a_preset_runs_to_its_end_and_goes_on_where_it_was_stopped(tmp_path, tasks, preset, kind):
    model = make_checkpoint(tmp_path / "tiny")
    folder = tmp_path / "out"
    options = ["--preset", preset, "--precision", "fp32", "--prompts", 1]
    options += ["--max-new-tokens", 2, "--no-compile"]
    whole, status = study(model, tasks, folder, *options)
    (found,) = whole["precisions"]
    assert found["missing"] == []
    assert len(found[kind]["configurations"]) == 12
    runs = sorted((folder / "runs").glob(f"{kind}-*"))
    assert len(runs) == 12
    kept = [next(run.iterdir()).read_bytes() for run in runs[:6]]
    for run in runs[6:]:  # as far as a night reached
        shutil.rmtree(run)
    assert study(model, tasks, folder, *options, "--resume") == (whole, status)
    assert [next(run.iterdir()).read_bytes() for run in runs[:6]] == kept


@pytest.mark.deep
@pytest.mark.model
def test_exact_is_the_same_on_every_simulated_gpu_and_bf16_is_not(tmp_path, tasks):
    """Two layers of SmolLM2, whole width and vocabulary: its arithmetic is real."""
    model, tokenizer = smollm2.load(layers=2)
    folder = tmp_path / "two-layers"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = ["--preset", "standard", "--precision", "bf16,exact", "--prompts", 1]
    options += ["--max-new-tokens", 2, "--batch-sizes", "1", "--orders", "1"]
    options += ["--gpus", "v100,a100,h100", "--no-compile"]
    found, status = study(folder, tasks, tmp_path / "out", *options)
    bf16, exact = found["precisions"]
    gpus = {p["precision"]: {s["gpu"]: s for s in p["shifts"]} for p in found["precisions"]}
    assert set(gpus["exact"]) == {None, "v100", "a100", "h100"}
    assert set(gpus["bf16"]) == {None, "a100", "h100"}
    assert all(shift["identical"] for shift in gpus["exact"].values())
    assert not any(shift["identical"] for shift in gpus["bf16"].values())
    assert (exact["reproducible"], exact["bit_identical"]) == (True, True)
    assert bf16["bit_identical"] is False
    assert list(bf16["unavailable"].values()) == ["a V100 has no BF16 tensor core"]
    assert status == (0 if bf16["reproducible"] else 1)
