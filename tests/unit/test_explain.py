"""`explain`: what the report says in text, JSON and HTML, and that no name in it can do harm."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import healpass
from healpass import HealConfig
from healpass.graph.pipeline import PASSES
from healpass.report import GRAPH_BREAK, SCHEMA, Boundary, GraphReport, HealReport, NodeRecord
from healpass.report_view import CURES
from tests.support.against_torch import random

BF16 = torch.bfloat16
X = random(3, 8)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8, dtype=BF16)

    def forward(self, x):
        return self.proj(x)


class Model(nn.Module):
    """Three equal layers, a product that must be kept, and a graph break."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        torch._dynamo.graph_break()
        return x, x.double() @ x.double().t()


@pytest.fixture(scope="module")
def report() -> HealReport:
    torch._dynamo.reset()
    return healpass.explain(Model())(X)


def test_every_matmul_is_recorded_with_its_fate(report):
    assert [node.heal_op for node in report.nodes] == ["heal::linear"] * 3 + [None]
    assert [node.rewritten for node in report.nodes] == [True] * 3 + [False]
    assert [node.reason for node in report.kept] == ["float64 is wider than FP32 already"]
    assert len(report.graphs) == 2
    assert len(report.breaks) == 1


def test_a_record_leads_back_to_the_users_source(report):
    node = report.nodes[0]
    assert re.search(r"test_explain\.py:\d+ in forward$", node.line)
    assert node.code == "return self.proj(x)"
    assert node.shapes == "bf16[3, 8], bf16[8, 8], bf16[8]"
    assert re.match(r"8(\.\d+)?u S", node.bound or "")
    assert [n.module for n in report.nodes[:3]] == [f"layers.{i}.proj" for i in range(3)]


def test_outputs_and_what_crosses_a_graph_break_are_listed_as_16_bit_boundaries(report):
    assert [(b.kind, b.dtype) for b in report.boundaries] == [("graph break", "bfloat16")]
    found = healpass.explain(Layer())(X)
    assert [(b.kind, b.dtype) for b in found.boundaries] == [("graph output", "bfloat16")]


def test_explaining_changes_nothing(report):
    torch.manual_seed(0)
    model = Model()
    before = [p.clone() for p in model.parameters()]
    healpass.explain(model)(X)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch._dynamo.eval_frame is not None
    assert model(X)[0].dtype == BF16


def test_equal_layers_share_a_row(report):
    text = str(report)
    assert "3 of 4 matmul and SDPA nodes rewritten in 2 graph(s)" in text
    assert "layers.*.proj" in text
    assert "layers.1.proj" not in text
    assert "graph break" in text


def test_the_json_is_versioned_plain_data(report):
    read = json.loads(report.to_json())
    assert read["schema"] == SCHEMA
    assert read["config"]["precision"] == "heal"
    assert [len(graph["nodes"]) for graph in read["graphs"]] == [3, 1]
    assert set(read["graphs"][0]["passes"][0]) == {"name", "changed", "seconds"}
    assert read == json.loads(report.to_json(indent=None))


def test_printing_goes_to_a_file(report):
    out = io.StringIO()
    report.print(file=out)
    assert "precision=heal" in out.getvalue()


def test_options_and_keyword_arguments_are_taken():
    config = {"precision": "layercast", "outputs": "fp32"}
    found = healpass.explain(lambda x, *, config: x @ config, config)(X, config=X.t())
    assert found.config["precision"] == "layercast"
    assert [node.op for node in found.nodes] == ["matmul"]
    assert not found.boundaries


def test_a_baseline_and_a_model_without_matmuls_give_an_empty_report():
    assert healpass.explain(Model(), precision="traced")(X).nodes == []
    empty = healpass.explain(lambda x: x + 1)(X)
    assert "0 of 0" in str(empty)
    assert "none" in healpass.explain(lambda x: x.float() + 1)(X)._repr_html_()


def test_the_first_screen_is_a_verdict_in_80_columns(report):
    lines = str(report).splitlines()
    assert lines[0].startswith("precision=heal: 3 of 4 matmul and SDPA nodes rewritten")
    assert "Still rounded to 16 bits: 1 graph break." in str(report)
    assert "Way out: take what breaks the graph out" in str(report)
    assert max(map(len, lines)) <= 80
    assert "8u S" not in str(report), "bounds only on request"
    assert "test_explain.py" in str(report), "the line of what was kept"


def test_bounds_operands_and_lines_come_on_request(report):
    text = report.text(bounds=True)
    assert "bf16[3, 8], bf16[8, 8], bf16[8]" in text
    assert "u S" in text
    assert re.search(r"test_explain\.py:\d+ in forward", text)
    out = io.StringIO()
    report.print(file=out, bounds=True)
    assert out.getvalue() == text


def test_a_cache_and_outputs_of_the_caller_have_one_cure():
    boundary = [Boundary("x", kind, "bfloat16", "rounded", "a.py:1 in f")
                for kind in ("cache of the caller", "graph output")]  # fmt: skip
    text = HealReport({"precision": "heal"}, [GraphReport([], boundary)]).text()
    assert text.count("Way out:") == 1
    assert "heal_model(model) cures both" in text


def test_every_kind_of_boundary_has_a_cure():
    """Compared with the kinds that the passes name, in the source itself."""
    named = set()
    for path in (Path(healpass.__file__).parent / "graph").rglob("*.py"):
        named |= set(re.findall(r'"((?:cache|buffer) of the caller|foreign operator|graph \w+)"',
                                path.read_text()))  # fmt: skip
    assert named | {GRAPH_BREAK} == set(CURES)


def test_the_old_way_to_call_it_warns_and_works():
    with pytest.warns(DeprecationWarning, match=r"explain\(model, \*\*options\)\(inputs\)"):
        found = healpass.explain(lambda x, y: x @ y, X, X.t(), config=HealConfig(kv="int24"))
    assert found.config["kv"] == "int24"
    with pytest.warns(DeprecationWarning, match="deprecated"):
        healpass.explain(lambda x, y: y if x is None else x, None, X)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert len(healpass.explain(lambda *, x: x @ x.t(), x=X).nodes) == 1


def test_an_error_of_the_model_reaches_the_user():
    with pytest.raises(RuntimeError, match="reduction dim"):
        healpass.explain(lambda x: x @ x)(X)


HOSTILE = "<script>alert('&\"')</script>[bold]\x1b[31m"


def hostile_report() -> HealReport:
    node = NodeRecord(*[HOSTILE] * 9)
    boundary = Boundary(*[HOSTILE] * 5)
    return HealReport({"precision": HOSTILE}, [GraphReport([node], [boundary])], breaks=[HOSTILE])


def test_html_escapes_hostile_names():
    html = hostile_report()._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_text_and_json_keep_hostile_names_as_text():
    report = hostile_report()
    assert json.loads(report.to_json())["graphs"][0]["nodes"][0]["name"] == HOSTILE
    text = re.sub(r"[\s│]+", "", str(report))
    assert "[bold]" in text, "brackets are not markup"
    assert "\x1b" not in str(report), "no escape sequence reaches the terminal"


# ---------------------------------------------------------------------------- logs, artifacts


def test_the_log_says_what_was_rewritten(caplog):
    with caplog.at_level(logging.DEBUG, logger="healpass"):
        healpass.explain(lambda x: x @ x.t())(X)
    assert "heal: 1 of 1 matmul and SDPA nodes rewritten" in caplog.text
    assert "pass promote changed" in caplog.text


def test_torch_logs_accepts_our_name():
    torch._logging.set_logs(modules={"healpass": logging.DEBUG})
    try:
        assert logging.getLogger("healpass.graph.pipeline").isEnabledFor(logging.DEBUG)
    finally:
        torch._logging.set_logs()


def test_each_pass_leaves_the_graph_before_and_after_for_tlparse(monkeypatch):
    kept: dict[str, str] = {}

    def record(name, metadata_fn=dict, payload_fn=str, **_):
        if name == "artifact" and metadata_fn()["name"].startswith("heal"):
            kept[metadata_fn()["name"]] = payload_fn()

    monkeypatch.setattr("healpass.graph.pipeline.torch._logging.trace_structured", record)
    healpass.explain(lambda x: (x @ x.t()).relu())(X)
    assert "torch.ops.heal" not in kept["heal_before_matmul"]
    assert "torch.ops.heal.matmul" in kept["heal_after_matmul"]
    assert [n for n in kept if n.startswith("heal_after")] == [
        f"heal_after_{name}" for name in PASSES
    ]


def test_a_notebook_shows_the_tables_whatever_it_can_show(report):
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, _ = formatters.DisplayFormatter().format(report)
    assert shown["text/plain"] == str(report).rstrip()
    assert "<table>" in shown["text/html"]
    assert "graph_break" in shown["text/html"]
