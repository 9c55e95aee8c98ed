"""Two machines' reports: first token, first operation, and what cannot be compared."""

import copy
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from healpass import cli, strict_json
from healpass.errors import StudyError
from healpass.study.judge import diff
from healpass.study.run.records import SCHEMA
from healpass.study.run.traces import trace_of


def report(noise=0.0, token=7):
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(5, 300, generator=generator) for name in ("embed", "mlp", "head")}
    for name in ("mlp", "head"):
        values[name] = values[name] * (1 + noise)
    trace = {name: sketch.to_dict() for name, sketch in trace_of(values).items()}
    return {
        "schema": SCHEMA,
        "plan": {"tasks": "t", "prompts": 2, "max_new_tokens": 4},
        "answers": {"bf16": {"batch 1": [[1, 2], [3, token]], "batch 8": [[1, 2], [3, 7]]}},
        "anatomy": {"bf16": {"trace": trace}},
    }


def test_equal_reports_do_not_differ():
    (found,) = diff.compare(report(), report())
    assert found.same
    assert "4 of 4 answers are the same" in str(found)
    assert "all 3 operations have the same bits" in str(found)


def test_the_first_token_and_operation_are_named():
    (found,) = diff.compare(report(), report(noise=1e-3, token=8))
    assert not found.same
    assert found.first_token == (1, 1, "batch 1")
    assert found.first_operation == "mlp"
    # Values times 1 + 1e-3, so sketches too: the estimate is off by FP32 roundings only.
    assert abs(found.deviation / 1e-3 - 1) <= 6 * math.sqrt(2 / 64)
    assert "token 2 of prompt 1 (batch 1)" in str(found)
    assert "first operation that differs: mlp" in str(found)


def test_a_report_before_strict_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(report()).replace('"norm": ', '"norm": Infinity, "was": '))
    assert diff.read(path)["anatomy"]["bf16"]["trace"]["mlp"]["norm"] == math.inf


def test_an_infinite_deviation_is_valid_json(tmp_path):
    # Of a value that is 0 on one machine only, any deviation is infinite.
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, noise in zip(paths, (-1.0, 0.0), strict=True):
        path.write_text(strict_json.dumps(report(noise)))
    out = run(*paths, "--json").stdout
    (found,) = json.loads(out, parse_constant=pytest.fail)["precisions"]
    assert (found["first_operation"], found["deviation"]) == ("mlp", "inf")


def test_nothing_compared_is_not_the_same():
    bare = report()
    bare["anatomy"], bare["answers"] = {}, {"bf16": {}}
    (found,) = diff.compare(bare, bare)
    assert not found.same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["plan"].update(prompts=3), "differ in prompts: 2 and 3"),
        (lambda r: r.update(answers={"heal": {}}), "no precision in common"),
    ],
)
def test_different_questions_are_refused(change, message):
    other = copy.deepcopy(report())
    change(other)
    with pytest.raises(StudyError, match=message):
        diff.compare(report(), other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no report"),
        (json.dumps(report() | {"schema": 99}), "schema 99"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(StudyError, match=message):
        diff.read(path)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["diff", *map(str, arguments)])


def test_the_command_tells_by_its_exit_code(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, noise in zip(paths, (0.0, 1e-3), strict=True):
        path.write_text(json.dumps(report(noise)))
    assert run(paths[0], paths[0]).exit_code == 0
    assert run(*paths).exit_code == 1
    assert json.loads(run(*paths, "--json").stdout)["precisions"][0]["first_operation"] == "mlp"
    missing = run(paths[0], tmp_path / "c.json")
    assert missing.exit_code == 2
    assert "cannot read" in missing.output
