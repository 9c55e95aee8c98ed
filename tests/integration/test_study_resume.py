"""What ends a study early, and that it goes on: Ctrl-C, a full disk, a file cut in half."""

import errno
import os
import signal

import pytest
from rich.console import Console

from healpass.errors import StudyError
from healpass.integrations.checkpoint import Checkpoint
from healpass.study import check
from healpass.study.plan.configuration import Configuration, StudyPlan
from healpass.study.run import runner
from tests.support.study_models import make_checkpoint, write_tasks

ONE = Configuration(precision="bf16")
TWO = Configuration(precision="bf16", batch_size=2)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Three prompts: three batches of one, two of two, and scores of the first's answers."""
    folder = tmp_path_factory.mktemp("model")
    tasks = write_tasks(folder / "tasks.jsonl", ["How many?", "Which share?", "What remains?"])
    return StudyPlan(
        model=str(make_checkpoint(folder / "tiny")),
        greedy=(ONE, TWO),
        forced=(ONE,),
        tasks=str(tasks),
        prompts=3,
        max_new_tokens=5,
        compiled=False,
    )


def study(plan, folder, *, resume=True):
    """What a study finds, without the times."""
    request = check.Request(folder, "command", resume=resume, quiet=True)
    result = check.check(plan, request, Console(quiet=True)).to_dict()
    for found in result["precisions"]:
        del found["seconds_per_token"], found["relative_cost"]
    return result


@pytest.fixture(scope="module")
def undisturbed(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    return study(plan, folder, resume=False), folder


def records(folder):
    """Each record's first prompt by its unit; whatever else lies there shows up, too."""
    return sorted(str(path.relative_to(folder / "runs")) for path in folder.rglob("runs/*/*"))


@pytest.mark.parametrize("steps", [0, 1, 8, 19])
def test_ctrl_c_in_the_middle_of_a_batch_loses_that_batch_only(
    plan, undisturbed, tmp_path, monkeypatch, steps
):
    class Interrupted(Checkpoint):
        """A model whose user presses Ctrl-C after so many tokens."""

        def model(self, dtype="bfloat16"):
            model, calls = super().model(dtype), []

            def press(module, args):
                calls.append(module)
                if len(calls) > steps:
                    signal.raise_signal(signal.SIGINT)

            model.lm_head.register_forward_pre_hook(press)
            return model

    folder = tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with monkeypatch.context() as patched:
            patched.setattr(runner, "Checkpoint", Interrupted)
            with pytest.raises(KeyboardInterrupt):
                study(plan, folder)
    finally:
        signal.signal(signal.SIGINT, before)
    kept, whole = records(folder), records(undisturbed[1])
    assert len(kept) < len(whole)
    assert set(kept) <= set(whole)
    held = {name: (folder / "runs" / name).read_bytes() for name in kept}
    assert study(plan, folder) == undisturbed[0]
    assert {name: (folder / "runs" / name).read_bytes() for name in kept} == held
    assert records(folder) == whole


def test_a_disk_that_fills_up_again_and_again_loses_nothing(
    plan, undisturbed, tmp_path, monkeypatch
):
    folder = tmp_path / "out"
    flush = os.fsync
    kept, messages = [], []
    for room in range(1, 40):
        written = []

        def full(stream, written=written, room=room):
            written.append(stream)
            if len(written) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(stream)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            try:
                found = study(plan, folder)
                break
            except StudyError as error:
                messages.append(str(error))
        assert set(kept) <= set(records(folder))
        kept = records(folder)
    assert len(messages) > 3
    assert all("No space left" in text and "--resume" in text for text in messages)
    assert found == undisturbed[0]
    assert records(folder) == records(undisturbed[1])
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("unit", ["greedy-bf16-batch2", "forced-bf16-batch1"])
def test_a_record_cut_in_half_is_named_and_run_again(plan, undisturbed, tmp_path, unit):
    folder = tmp_path / "out"
    study(plan, folder)
    path = min((folder / "runs" / unit).iterdir())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StudyError, match=f"{path.name} is damaged") as error:
        study(plan, folder)
    assert "Delete this one file" in str(error.value)
    assert path.stat().st_size == len(content) // 2
    path.unlink()
    assert study(plan, folder) == undisturbed[0]


def test_a_plan_cut_in_half_is_not_guessed(plan, tmp_path):
    folder = tmp_path / "out"
    study(plan, folder)
    path = folder / "plan.json"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StudyError, match=r"plan.json is damaged") as error:
        study(plan, folder)
    assert "Delete" not in str(error.value)
    path.unlink()
    for resume in (True, False):
        with pytest.raises(StudyError, match=r"records but no plan\.json"):
            study(plan, folder, resume=resume)
    path.write_bytes(content)
    study(plan, folder)
