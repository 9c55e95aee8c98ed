"""The benchmark and `run_all.sh`, which need a GPU, as far as they can be run without one."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from healpass.bench.command import Request
from tests.gpu import bench
from tests.support.fake_cuda import always

SCRIPT = Path(__file__).parents[1] / "gpu" / "run_all.sh"


def fake_rows(model: str, m: int, n: int, k: int) -> Iterator[bench.Row]:
    """Times of an imagined GPU: powers of two, so that the ratios of the table are known."""
    for position, name in enumerate(bench.NAMES):
        yield bench.Row(model, m, n, k, name, 2.0**position, 1.0, 0.0, "GPU", "t", "t", "command")


def run(monkeypatch, folder: Path, seconds: float) -> list[dict[str, str]]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "imagined GPU")
    monkeypatch.setattr(bench, "measure", fake_rows)
    monkeypatch.setattr(bench, "SECONDS", seconds)
    monkeypatch.setattr(bench.sys, "argv", ["bench", str(folder)])
    precision = torch.backends.cuda.matmul.fp32_precision
    bench.main()
    torch.backends.cuda.matmul.fp32_precision = precision
    with (folder / "templates.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_cell_stands_in_the_csv_and_the_table_comes_last(monkeypatch, tmp_path, capsys):
    rows = run(monkeypatch, tmp_path, 1e9)
    layers = sum(len(layers) for layers in bench.MODELS.values())
    assert len(rows) == layers * len(bench.ROWS) * len(bench.NAMES)
    assert set(rows[0]) >= {"gpu", "torch", "triton", "command", "microseconds", "error_to_fp64"}
    lines = capsys.readouterr().out.splitlines()
    table = lines[-len(bench.MODELS) * len(bench.ROWS) :]
    assert all(line.startswith(tuple(bench.MODELS)) for line in table)
    heal, fp32, exact = map(bench.NAMES.index, ("heal", "fp32", "exact"))
    cut = (2**fp32 - 1) / (2**heal - 1)
    ratios = [2.0**heal, 2.0**exact, 2.0 ** (fp32 - heal)]
    shown = [*(f"{ratio:.2f}" for ratio in ratios), f"{cut:.1f}"]
    assert all(line.split()[-4:] == shown for line in table)


def test_what_nobody_measured_says_so(monkeypatch, tmp_path, capsys):
    rows = run(monkeypatch, tmp_path, -1.0)
    assert {row["microseconds"] for row in rows} == {"not measured"}
    assert {row["gpu"] for row in rows} == {"imagined GPU"}
    table = capsys.readouterr().out.splitlines()[-len(bench.MODELS) * len(bench.ROWS) :]
    assert all(line.endswith("not measured") for line in table)


def test_the_listed_contenders_are_compared(monkeypatch):
    monkeypatch.setattr(bench, "compiled", always(None))
    assert tuple(bench.contenders()) == bench.NAMES


# --------------------------------------------------------------------------------- run_all.sh


def script(
    folder: Path, tests: int, times: int = 0, command: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run the script with stand-ins for python3 and nvidia-smi, which end with the given codes."""
    commands = {
        "nvidia-smi": "echo imagined GPU",
        "python3": f"""case "$*" in
            "-m pytest"*) echo "3 passed"; exit {tests};;
            "-m tests.gpu.bench"*) echo "the table"; exit {times};;
            *"bench --device cuda"*) echo "contenders"; exit {command};;
        esac""",
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "OUT": str(folder / "out")}
    return subprocess.run(
        ["bash", str(SCRIPT)], capture_output=True, text=True, env=environment, check=False
    )


def test_the_script_ends_with_the_table(tmp_path):
    done = script(tmp_path, tests=0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["imagined GPU", "3 passed", "the table", "contenders"]


def test_the_script_times_nothing_that_failed_its_tests(tmp_path):
    done = script(tmp_path, tests=1)
    assert done.returncode == 1
    assert "no times taken" in done.stdout
    assert "the table" not in done.stdout


def test_the_script_reports_a_benchmark_that_failed(tmp_path):
    assert script(tmp_path, tests=0, times=7).returncode == 7
    assert script(tmp_path, tests=0, command=3).returncode == 3


def test_a_bench_that_the_clock_ended_is_a_shorter_one(tmp_path):
    done = script(tmp_path, tests=0, command=124)
    assert done.returncode == 0
    assert "ended by the clock" in done.stdout.splitlines()[-1]


def test_the_script_ends_within_nine_minutes():
    """The tests, and then the longer of its two ways."""
    text = SCRIPT.read_text()
    tests, attention, layers, contenders = map(int, re.findall(r"timeout (\d+) python3", text))
    assert tests + max(attention, layers + contenders) <= 9 * 60


def test_the_script_asks_healpass_bench_for_what_there_is(monkeypatch):
    """Its options, as the command line reads them: every contender that a GPU has."""
    words = shlex.split(re.search(r" bench (--device.*?)>", SCRIPT.read_text(), re.DOTALL)[1])
    given = dict(zip(*[(word for word in words if word.strip())] * 2, strict=True))
    asked = Request("", given["--shapes"], given["--device"], tuple(given["--what"].split(",")),
                    (), int(given["--rounds"]), None, None)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", always(True))
    plan = asked.plan()
    assert [w.name for w in plan.workloads] == [
        "decode 1", "decode 8", "attention 512", "attention 2048", "prefill 512"
    ]  # fmt: skip
    assert {c.name for c in plan.contenders} >= {"tf32x3", "bf16x6", "bf16-invariant"}
