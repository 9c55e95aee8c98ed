"""`healpass check --engine vllm` without vLLM: axes, verdicts, exit codes, wrong use."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from healpass import cli
from healpass.errors import MissingExtraError, StudyError, UnavailableError
from healpass.integrations.vllm import checking
from healpass.integrations.vllm import explained as explaining
from healpass.integrations.vllm.checking import Answer, Asked, Events, axes, check
from healpass.study import serving

PROMPTS = [[1] * 10, [2] * 30]
ASKED = Asked(model="m", options={"precision": "exact"}, prompts=PROMPTS, new_tokens=8)
#: What an engine that does all it is asked counts.
ALL = {"at_once": 2, "cut": 1, "cached": 16, "preemptions": 1}


def pretend(monkeypatch, events=ALL, changed=()):
    """Engines whose answers differ where an axis of `changed` asks for them."""
    asked_for = []

    def answers(asked, name):
        asked_for.append((name, asked))
        size = asked.engine.get("block_size", 16)
        caches = asked.engine.get("enable_prefix_caching", True)
        happened = events | {"block_size": size, "cached": events["cached"] * caches}
        last = -0.5 if name in changed else -1.0
        found = [Answer((1, 2), (-0.25, -1.0)), Answer((3, 4), (-0.25, last))]
        return found, Events(**happened)

    monkeypatch.setattr(checking, "answers", answers)
    return asked_for


def test_every_axis_is_an_engine_of_its_own(monkeypatch):
    asked_for = pretend(monkeypatch)
    rows = list(check(ASKED))
    assert [name for name, _ in asked_for] == ["alone", *(row.axis.name for row in rows)]
    assert all(row.holds for row in rows)
    engines = dict(asked_for)
    assert engines["alone"].arrivals == "alone"
    assert engines["one every second step"].arrivals == "staggered"
    assert engines["prefixes in the cache"].rounds == 2
    chunks = engines["prompts in chunks of 16"].engine
    assert chunks == {"max_model_len": 38, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    # A page for each prompt, and vLLM's own; the second answer needs another.
    assert engines["too few pages"].engine["num_gpu_blocks_override"] == 3


def test_one_bit_is_a_difference(monkeypatch):
    pretend(monkeypatch, changed=("blocks of 32",))
    rows = {row.axis.name: row for row in check(ASKED)}
    assert rows["blocks of 32"].equal == 1
    assert [name for name, row in rows.items() if not row.holds] == ["blocks of 32"]


@pytest.mark.parametrize("event", ["at_once", "cut", "cached", "preemptions"])
def test_what_did_not_happen_shows_nothing(monkeypatch, event):
    pretend(monkeypatch, ALL | {event: 0})
    rows = list(check(ASKED))
    missed = {row.axis.event for row in rows if not row.happened}
    assert missed == {event}
    found = {"exact": rows}
    assert not serving.holds(found)
    assert "which did not happen" in " ".join(serving.verdict(found))


def test_a_cache_that_should_not_be_there_is_no_miss(monkeypatch):
    (axis,) = [axis for axis in axes(PROMPTS, 8) if axis.name == "no prefix cache"]
    assert axis.happened(Events(cached=0))
    assert not axis.happened(Events(cached=16))


def run(*arguments):
    return CliRunner().invoke(cli.app, ["check", "m", "--engine", "vllm", *arguments])


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(serving.Request, "asked", lambda self: dict.fromkeys(
        self.precisions, replace(ASKED, new_tokens=self.max_new_tokens)
    ))  # fmt: skip


def test_the_table_and_exit_code_0(monkeypatch, engines):
    pretend(monkeypatch)
    done = run("--precision", "exact,none")
    assert done.exit_code == 0
    assert "exact: every answer has the bits of the request alone." in done.stdout
    assert "vLLM as it is: answers equal" in done.stdout
    assert "16 tokens from the cache" in done.stdout


def test_a_difference_is_exit_code_1_as_json(monkeypatch, engines):
    pretend(monkeypatch, changed=("all at once",))
    done = run("--json")
    assert done.exit_code == 1
    rows = {row["axis"]: row for row in json.loads(done.stdout)["exact"]}
    assert rows["all at once"]["equal"] == 1
    assert rows["all at once"]["events"]["at_once"] == 2
    assert rows["blocks of 32"]["equal"] == rows["blocks of 32"]["of"] == 2


@pytest.mark.parametrize(("arguments", "word"), [
    (["--gpus", "h100"], "--gpus belongs to transformers"),
    (["--preset", "quick"], "--preset belongs to transformers"),
    (["--precision", "exakt"], "precision='exakt' is not one of"),
    (["--precision", "traced"], "leave the model as it is"),
])  # fmt: skip
def test_wrong_use_is_exit_code_2(arguments, word):
    done = run(*arguments)
    assert done.exit_code == 2
    assert word in done.stderr


def test_an_engine_that_nobody_has():
    done = CliRunner().invoke(cli.app, ["check", "m", "--engine", "sglang"])
    assert done.exit_code == 2
    assert "neither transformers nor vllm" in done.stderr


def test_a_gguf_file_is_quantized_by_itself():
    with pytest.raises(StudyError, match="16-bit checkpoint"):
        serving.Request(model="model.gguf").asked()


def test_without_vllm_the_pip_command_is_named(monkeypatch):
    monkeypatch.setattr(checking, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'healpass\[vllm\]'"):
        list(check(ASKED))


def test_a_process_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(checking, "find_spec", lambda name: name)
    with pytest.raises(UnavailableError, match="vLLM with alone ended with status 1"):
        checking.in_a_process("nowhere", {}, "alone")


FOUND = {
    "compiled": True,
    "layers": [
        {"name": f"model.layers.{n}.mlp.down_proj", "kind": "RowParallelLinear",
         "weight": "bfloat16", "runs": "heal::linear, exact5"}
        for n in range(2)
    ],
    "pages": [{"layers": 2, "heads": 3, "head_size": 64, "block_size": 16,
               "page_bytes": 16 * 3 * 264, "blocks": 100}],
    "graphs": [{"name": "model", "became": {"heal::mm": 2}, "kept": [["topk", "a reason", 1]]}],
}  # fmt: skip


def explained(*arguments):
    return CliRunner().invoke(cli.app, ["explain", "m", "--vllm", *arguments])


def test_explain_says_what_runs_where_in_vllm(monkeypatch):
    asked = []
    monkeypatch.setattr(explaining, "in_a_process", lambda *given: asked.append(given) or FOUND)
    text = explained("--precision", "exact", "--kv", "int24").stdout
    assert asked[0][1]["options"] == {"precision": "exact", "kv": "int24"}
    assert re.search(r"2 +model\.layers\.\*\.mlp\.down_proj +RowParallelLinear +bfloat16", text)
    assert "264 bytes per token and head, 1584 per token; 100 pages of 16 tokens" in text
    assert "Graph of model, compiled whole; rewritten: 2 heal::mm" in text
    assert "kept: 1 topk: a reason" in text
    assert json.loads(explained("--json").stdout) == FOUND


def test_explain_in_vllm_refuses_what_belongs_to_transformers():
    done = explained("--observe")
    assert isinstance(done.exception, StudyError)
    assert "--observe belongs to transformers" in str(done.exception)
