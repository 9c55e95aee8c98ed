"""The examples run: at a tiny size, and with the result that their docstrings promise.

`generate_reproducibly`, `one_line` and `simulated_gpus` have tests of their own, and so has
`reported_issues` (test_reports). Here torch runs the rewritten graphs: Inductor, which takes most
of an example's time, has its own tests.
"""

import io
import os
import subprocess
import sys
import warnings

import pytest
import torch
from rich.console import Console

from healpass.integrations import smollm2
from healpass.integrations.transformers import heal_model
from tests.support.bits import differing
from tests.support.examples import EXAMPLES, load_example, run_by_torch
from tests.support.ranks import on_ranks, table_rank

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    monkeypatch.setattr("healpass.backend._inductor", run_by_torch)


@pytest.fixture(autouse=True)
def no_gradients():
    """Examples decide for themselves."""
    with torch.enable_grad():
        yield


def test_accuracy_and_reproducibility_are_bought_apart():
    example = load_example("which_precision")
    found = example.main(["--tokens", "8", "--layers", "1"])
    assert set(found) == set(example.CHOICES)
    exact = {name: row for name, row in found.items() if name.startswith("exact")}
    assert all(row.changed == 0 for row in exact.values())
    plain, more = exact.values()
    assert more.rms < plain.rms < found["bf16, as the model is"].rms
    assert found["heal, kv=int24"].rms < plain.rms


def test_rl_mismatch_is_zero_in_exact_and_not_in_bf16():
    example = load_example("rl_mismatch")
    found = {}
    for name, (dtype, config) in example.WAYS.items():
        torch._dynamo.reset()
        model, tokenizer = smollm2.load(dtype, layers=2, vocabulary=500)
        model = model if config is None else heal_model(model, **config)
        found[name] = example.measure(model, tokenizer, new_tokens=4)
    worst = {name: float(mismatch.difference.abs().max()) for name, mismatch in found.items()}
    print(worst)
    assert worst["exact"] == 0
    assert worst["BF16"] > 0
    # A rounding to BF16 is 2**16 roundings to FP32; the BF16 network makes at least one more.
    assert worst["heal"] * 2**8 < worst["BF16"]
    out = io.StringIO()
    Console(file=out, width=120).print(example.table_of(found))
    (row,) = (line.split("│") for line in out.getvalue().splitlines() if "exact" in line)
    assert [cell.strip() for cell in row[3:7]] == ["0", "0", "0", "1"]


def test_train_distributed_learns_on_one_process(capsys):
    load_example("train_distributed").main(["--steps", "3"])
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert losses[2] < losses[0]


def test_train_distributed_asks_for_torchrun(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        load_example("train_distributed").main(["--how", "fsdp"])
    assert "start it with torchrun" in capsys.readouterr().err


@pytest.mark.deep
@pytest.mark.parametrize("how", [[], ["--how", "fsdp"]], ids=["ddp", "fsdp"])
def test_train_distributed_on_two_processes_agrees_with_one(how, capsys):
    load_example("train_distributed").main(["--steps", "3"])
    one = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(EXAMPLES / "train_distributed.py"), *how, "--steps", "3"],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    two = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert two == pytest.approx(one, abs=2e-6), "printed with six digits"


@pytest.mark.deep
def test_rank_bits_differ_for_heal_and_not_for_exact(tmp_path):
    """Both tables; the processes let torch run the rewritten graphs."""
    example = load_example("rank_bits")
    found = {ranks: on_ranks(ranks, tmp_path / str(ranks), table_rank)[0] for ranks in (1, 2, 4)}
    for table in (example.gradient_table(found), example.logit_table(found)):
        Console(width=100).print(table)
    for ranks in (2, 4):
        mine, alone = found[ranks], found[1]
        assert differing(mine["exact"], alone["exact"]) == 0
        assert differing(mine["logits"]["exact"], alone["logits"]["exact"]) == 0
        (means, magnitudes), (first, _) = mine["heal"], alone["heal"]
        assert 0 < example.order_ratio(means, first, magnitudes) <= 1
        assert differing(means, first) > 0, "the inverse"
        assert differing(mine["logits"]["heal"], alone["logits"]["heal"]) > 0
        assert differing(mine["logits"]["BF16"], alone["logits"]["BF16"]) > 0


@pytest.mark.deep
def test_grpo_has_one_log_probability_in_exact(capsys):
    """And another in TRL's fused head, which no compiler reaches: the inverse."""
    pytest.importorskip("trl")
    for fused, end in (([], "ratio 1 to 1"), (["--fused"], "")):
        torch._dynamo.reset()
        sizes = ["--layers", "1", "--vocabulary", "500", "--new-tokens", "3"]
        with warnings.catch_warnings(record=True) as caught:
            load_example("grpo").main([*sizes, *fused])
        assert any("a fused head" in str(one.message) for one in caught) == bool(fused)
        *_, line = capsys.readouterr().out.replace("\n", " ").split("exact")
        assert ("largest difference 0," in line) == (not fused)
        assert line.rstrip().endswith(end)


@pytest.mark.parametrize("adapter", [[], ["--lora"]], ids=["full", "lora"])
def test_finetune_prints_falling_losses(adapter, capsys):
    pytest.importorskip("peft")
    load_example("finetune").main(["--steps", "2", "--layers", "1", "--length", "8", *adapter])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 2


def test_static_cache_answers_two_prompts_through_one_cache(capsys):
    load_example("static_cache").main(["--layers", "1", "--new-tokens", "3"])
    lines = capsys.readouterr().out.splitlines()
    # 64 tokens x 3 heads x keys and values, of 64 INT16 numbers and one FP32 scale each.
    assert lines[-1] == f"int16 cache of 64 tokens: {64 * 3 * 2 * (64 * 2 + 4)} bytes"


def test_evaluate_prints_a_line_per_batch_size(capsys):
    pytest.importorskip("lm_eval")
    load_example("evaluate").main(["--layers", "1", "--questions", "2", "--batch-sizes", "1", "2"])
    lines = capsys.readouterr().out.replace("\n", " ")
    assert "batch size 2: " in lines
    assert "of 6 scores differ" in lines


BY_TORCH = """
import healpass.backend
healpass.backend._inductor = lambda graph_module, *_: graph_module.forward
"""


def test_the_notebook_shows_what_it_says():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "batch_invariance.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BY_TORCH))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    shown = [out["data"] for out in outputs if "data" in out]
    plain, heal, exact = (float(data["text/plain"]) for data in shown[:3])
    assert exact == 0
    # A rounding to BF16 is 2**16 roundings to FP32; the BF16 network makes at least one more.
    assert heal * 2**8 < plain
    assert "text/html" in shown[-1], "the report shows itself as a table"
