"""`healpass bench`: the gate refuses what is broken, and nothing is made up."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch._dynamo.testing import CompileCounter

from healpass.bench import page, table, targets, workloads
from healpass.bench.contenders import CONTENDERS, DEFAULT, REFERENCE, choose, judges
from healpass.bench.run import Plan, Row, limit, measure, ratio, relative_error, spread
from healpass.bench.source import HEADS, SHAPES, ModelSource, ShapesSource
from healpass.bench.subject import Linear16, Subject
from healpass.bench.worker import Memory, Order, Worker
from healpass.bench.workloads import Workload
from healpass.environment import collect
from healpass.errors import BenchError, ConfigError
from tests.support.tiny_llama import SIZES, make_llama

SOURCE = ShapesSource("smollm2-135m")
DECODE = Workload("decode", 1)


def plan(*names: str, rounds: int = 2, source=SOURCE, workloads=(DECODE,)) -> Plan:
    return Plan(source, choose(names), workloads, "cpu", rounds, 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama of two layers in a folder."""
    folder = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(folder)
    return ModelSource(str(folder))


def test_a_run_gives_a_row_for_each_with_time_error_and_memory():
    rows = list(measure(plan("bf16-eager", "fp32-eager")))
    assert [(row.workload, row.contender) for row in rows] == [
        ("decode 1", "bf16-eager"),
        ("decode 1", "fp32-eager"),
    ]
    for row in rows:
        assert row.note == ""
        assert 0 < row.low <= row.median <= row.high
        assert row.error <= row.limit
        assert row.memory.held > 0
    halves, wholes = (row.memory.held for row in rows)
    weights = sum(n * k for n, k in SHAPES[SOURCE.name])
    assert halves >= 2 * weights
    assert wholes >= 4 * weights
    assert ratio(rows, rows[0], "bf16-eager") == 1


@dataclass(frozen=True)
class OffInHalf(ShapesSource):
    """Layers whose FP16 weights are one hundredth too large."""

    def load(self, dtype):
        layers = super().load(dtype)
        if dtype == torch.float16:
            for parameter in layers.parameters():
                parameter.data *= 1.01
        return layers


@pytest.mark.parametrize("kind", [OffInHalf, ShapesSource])
def test_the_gate_refuses_a_contender_that_is_wrong(kind):
    """No time is printed for it; the same contender with the right weights passes."""
    claims = replace(CONTENDERS["fp16-eager"], yardstick="fp32-eager")
    (row,) = measure(replace(plan(source=kind(SOURCE.name)), contenders=(claims,)))
    assert row.error <= row.limit if kind is ShapesSource else row.error > row.limit
    assert (row.median is None) == row.note.startswith("refused: its error") == (kind is OffInHalf)


@pytest.mark.parametrize("factor", [1 - 1e-3, 1 + 1e-3, math.nan])
def test_the_limit_notices_a_thousandth_and_nan(factor):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((4, 64), (64, 32)))
    exact = (x.double() @ weight.double()).numpy()
    yardstick = relative_error((x @ weight).double().numpy(), exact)
    allowed = limit(yardstick, 2.0**-24)
    assert yardstick <= allowed
    assert not relative_error(factor * (x @ weight).double().numpy(), exact) <= allowed


def test_a_contender_that_cannot_run_costs_only_its_row():
    impossible = replace(CONTENDERS["heal"], name="heal", options={"precision": "heel"})
    rows = list(measure(replace(plan(), contenders=(impossible, CONTENDERS["bf16-eager"]))))
    assert "precision='heel'" in rows[0].note
    assert rows[1].median is not None


def test_a_process_that_dies_is_named():
    worker = Worker(Order(CONTENDERS["bf16-eager"], SOURCE, "cpu", 1))
    worker._process.kill()
    with pytest.raises(BenchError, match="bf16-eager stopped in 'time'"):
        worker.ask("time", DECODE)
    worker.stop()


@pytest.mark.parametrize(
    "name", ["bf16-eager", "bf16-flash", "fp32-eager", "int16-eager", "layercast-published"]
)
@pytest.mark.parametrize("work", [Workload("prefill", 8), Workload("decode", 8)], ids=("p", "d"))
def test_eager_contenders_agree_with_the_reference(tiny, name, work):
    """Prefill and decode of a model: as far from FP64 as their formats allow."""
    torch.set_grad_enabled(False)
    try:
        found = {
            each: work.prepare(Subject(CONTENDERS[each], tiny, "cpu")).outputs().double().numpy()
            for each in (name, REFERENCE)
        }
    finally:
        torch.set_grad_enabled(True)
    assert found[name].shape == (workloads.INPUTS, SIZES["vocab_size"])
    roundoff = {"bf16-eager": 2.0**-9, "bf16-flash": 2.0**-9, "int16-eager": 2.0**-16}.get(
        name, 2.0**-24
    )
    error = relative_error(found[name], found[REFERENCE])
    print(f"{name}: {error / roundoff:.3g} roundoffs")
    # Two layers of 7 products and 3 norms each, rounded independently or all alike.
    assert error <= 2 * 10 * roundoff * math.sqrt(64)


def test_training_and_attention_are_comparable(tiny):
    for work in (Workload("train", 8), Workload("attention", 16)):
        exact, found = (
            work.prepare(Subject(CONTENDERS[name], tiny, "cpu")).outputs().detach().double()
            for name in (REFERENCE, "fp32-eager")
        )
        assert exact.shape == found.shape
        assert 0 < relative_error(found.numpy(), exact.numpy()) < 1e-4


def test_upcasting_keeps_tied_weights_tied(tiny):
    module = Subject(CONTENDERS["layercast-published"], tiny, "cpu").module
    assert all(
        child.weight.dtype == torch.bfloat16
        for child in module.modules()
        if isinstance(child, Linear16)
    )


def test_names_are_looked_up_and_the_nearest_is_suggested():
    assert {contender.name for contender in judges(choose(DEFAULT))} >= {REFERENCE, "fp32-eager"}
    with pytest.raises(ConfigError, match="Did you mean 'heal-int24'"):
        choose(["heal-int-24"])
    with pytest.raises(ConfigError, match="Did you mean 'llama-3-8b'"):
        ShapesSource("llama-3-8")


def written(*rows: Row, command: str = "healpass bench") -> list[dict[str, str]]:
    """Rows as a CSV holds them."""
    return table.every_cell(rows, table.provenance(plan(), collect(), command))


def test_a_workload_is_asked_for_by_its_kind_and_size():
    model = ModelSource("a")
    names = [w.name for w in workloads.workloads(("prefill:9", "decode", "prefill"), model)]
    assert names == ["prefill 9", "decode 128", "prefill 16", "prefill 128", "prefill 512"]
    assert workloads.workloads(("train:8",), SOURCE) == (), "layers alone do not train"
    with pytest.raises(ConfigError, match="Did you mean 'prefill'"):
        workloads.workloads(("prefil:9",), model)
    for wrong in ("prefill:", "prefill:0", "prefill:-1", "prefill:many"):
        with pytest.raises(ConfigError, match="a number of tokens or rows above 0"):
            workloads.workloads((wrong,), model)


def test_what_was_not_measured_says_so(tmp_path):
    rows = [
        Row("decode 1", "fp32-inductor", 1e-7, 3e-7, 0.5, 0.4, 0.6, Memory(10, None)),
        Row("decode 1", "heal", note="refused: [bold]x"),
    ]
    path = tmp_path / "rows.csv"
    table.write_csv(path, written(*rows))
    read = list(csv.DictReader(path.open()))
    assert read[0]["to_fp32"] == "1.000"
    assert read[0]["to_bf16"] == read[1]["milliseconds"] == table.UNMEASURED
    assert read[0]["peak_bytes_above"] == read[0]["held_to_bf16"] == table.UNMEASURED
    out = io.StringIO()
    Console(file=out, width=140).print(table.table(rows, "title"))
    assert "refused: [bold]x" in out.getvalue()
    assert "heal: refused: [bold]x." in page.markdown(read)
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(BenchError, match="cannot write"):
        table.write_csv(tmp_path / "none" / "rows.csv", [])


def test_memory_is_compared_with_bf16_of_the_same_workload():
    baseline = Row("decode 1", "bf16-inductor", memory=Memory(100, 20))
    other = Row("prefill 8", "bf16-inductor", memory=Memory(1, 1))
    found = written(other, baseline, Row("decode 1", "heal", memory=Memory(110, 40)))[-1]
    assert (found["held_to_bf16"], found["peak_to_bf16"]) == ("1.100", "1.250")


def test_a_second_run_replaces_its_own_workloads_and_keeps_the_others(tmp_path):
    path = tmp_path / "rows.csv"
    assert table.read_csv(path) == []
    first = written(Row("decode 1", "heal", median=1.0), Row("decode 1", "exact", median=2.0),
                    Row("prefill 8", "heal", median=3.0))  # fmt: skip
    table.write_csv(path, first)
    again = written(Row("decode 1", "heal", median=4.0), command="healpass bench again")
    merged = table.merge(table.read_csv(path), again)
    assert merged == [again[0], first[2]], "no row of the first decode, whoever ran it"
    path.write_text("name,value\n")
    with pytest.raises(BenchError, match="its columns are others"):
        table.read_csv(path)


def test_a_page_keeps_what_stands_around_its_tables(tmp_path):
    path = tmp_path / "page.md"
    rows = written(
        Row("decode 128", "fp32-inductor", median=1.0, low=0.9, high=1.1),
        Row("decode 128", "heal", median=0.375, low=0.3, high=0.4),
    )
    for _ in range(2):
        page.write_page(path, rows)
        text = path.read_text()
        assert text.count("\n| heal | ") == text.count(page.BEGIN) == text.count(page.END) == 1
        assert "| heal | 0.375 | 375 | 300 to 400 |" in text
        assert "| decode time / FP32-Inductor | 0.38 of 0.40: met | not measured" in text
        path.write_text(f"before\n{text}after\n")
    assert path.read_text().startswith("before\nbefore\n")
    path.write_text("a page of somebody else's")
    with pytest.raises(BenchError, match="does not have the lines"):
        page.write_page(path, rows)
    with pytest.raises(BenchError, match="cannot write"):
        page.write_page(tmp_path / "none" / "page.md", rows)


@pytest.mark.parametrize(("milliseconds", "met"), [(1.14, True), (1.15, True), (1.16, False)])
def test_the_worst_workload_decides_whether_a_target_is_met(milliseconds, met):
    """And a workload that was refused or not run is not met."""
    rows = [
        {"workload": "prefill 16", "contender": "heal", "to_fp32": "0.9"},
        {"workload": "prefill 128", "contender": "heal", "to_fp32": str(milliseconds)},
        {"workload": "prefill 16", "contender": "exact", "to_fp32": "0.9"},
        {"workload": "prefill 128", "contender": "exact", "to_fp32": table.UNMEASURED},
    ]
    found = {verdict.contender: verdict for verdict in targets.verdicts(rows)}
    assert found["heal"].met == met
    assert str(found["heal"]).endswith("met" if met else "missed")
    assert not found["exact"].met
    assert not found["layercast"].met
    assert targets.verdicts([]) == []


def test_targets_are_about_workloads_and_contenders_that_there_are():
    planned = {w.name for w in workloads.workloads(workloads.KINDS, ModelSource("a"))}
    for target in targets.TARGETS:
        assert planned.issuperset(target.workloads)
        assert CONTENDERS.keys() >= target.most.keys()
        assert target.column in table.COLUMNS


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Row("decode 1", name, median=t) for name, t in (("fp32-inductor", 2.0), ("heal", 1.0))]
    table.plot(tmp_path / "bars.svg", written(*rows), "title")
    assert "<svg" in (tmp_path / "bars.svg").read_text()
    with pytest.raises(BenchError, match="cannot write"):
        table.plot(tmp_path / "bars.nonsense", written(*rows), "title")


def test_a_function_that_would_run_eagerly_is_refused():
    """torch goes on eagerly at a graph break, and past its limit of recompilations."""

    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return 2 * x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        Subject(CONTENDERS["heal"], SOURCE, "cpu").compile(breaks)(torch.ones(3))


def test_workloads_of_a_contender_share_one_function_and_one_cache(tiny):
    """Or the context of decode and the prefill of as many tokens would compile twice."""
    subject = Subject(CONTENDERS["bf16-eager"], tiny, "cpu")
    assert subject.step is subject.step
    assert subject.cache is subject.cache


@pytest.mark.parametrize("name", ["bf16-inductor", "layercast", "heal", "heal-int24"])
def test_a_prefill_and_a_decode_step_are_compiled_once_each(tiny, monkeypatch, name):
    """Tokens and rounds after them reuse both graphs; Dynamo is counted, Inductor left out."""
    counter, compile_ = CompileCounter(), torch.compile

    def counted(function, *, dynamic, fullgraph, **_options):
        return compile_(function, backend=counter, dynamic=dynamic, fullgraph=fullgraph)

    monkeypatch.setattr(torch, "compile", counted)
    torch._dynamo.reset()
    with torch.no_grad():
        subject = Subject(CONTENDERS[name], tiny, "cpu")
        decode = Workload("decode", 8).prepare(subject)
        seen = []
        for do in (decode.reset, decode.run, decode.reset, decode.run):
            do()
            seen.append(counter.frame_count)
        assert seen == [1, 2, 2, 2], f"{workloads.STEPS} steps a run"
        subject.step(workloads.tokens(subject, 3, seed=0))
        assert counter.frame_count == 3, "the counter sees a graph of another length"


def test_the_spread_is_of_the_rounds():
    found = spread([3.0, 1.0, 2.0, 5.0, 4.0])
    assert found["median"] == 3
    assert found["low"] == np.quantile([1, 2, 3, 4, 5], 0.2)


def test_what_overrules_the_tf32_switch_stands_in_every_row():
    environment = replace(collect(), variables={"NVIDIA_TF32_OVERRIDE": "1", "OTHER": "x"})
    common = table.provenance(plan(), environment, "healpass bench")
    switch = torch.backends.cuda.matmul.fp32_precision
    assert common["fp32_precision"] == f"{switch} NVIDIA_TF32_OVERRIDE=1"


def test_the_layers_of_a_model_know_its_attention():
    """`attention` with `--shapes`: as many heads as the rows of the first layer say."""
    for name, heads in HEADS.items():
        assert SHAPES[name][0][0] == (heads.queries + 2 * heads.keys) * heads.size
        assert SHAPES[name][1][1] == heads.queries * heads.size
    outputs = Workload("attention", 5).prepare(Subject(CONTENDERS[REFERENCE], SOURCE, "cpu"))
    assert outputs.outputs().shape == (1, 9, 5, 64)
