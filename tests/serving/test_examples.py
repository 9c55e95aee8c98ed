"""The examples that run vLLM, at a tiny size, with the result that their docstrings promise."""

from __future__ import annotations

import gc

from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.engines import save_model
from tests.support.examples import load_example, run_by_torch
from tests.support.study_models import write_tasks


def test_the_importance_ratio_of_a_rollout_is_1_in_exact_only(monkeypatch):
    monkeypatch.setattr("healpass.backend._inductor", run_by_torch)
    found = load_example("rl_rollout_vllm").main(["--steps", "2", "--new-tokens", "8"])
    assert found["exact"].numel() == 2 * 4 * 8
    assert bool((found["exact"] == 1).all())
    for name in ("heal", "BF16"):
        assert bool((found[name] != 1).any())


def test_scores_do_not_depend_on_the_batch_in_exact(tmp_path):
    example, folder = load_example("reproducibility_vllm"), save_model("llama", tmp_path)
    byte_tokenizer().save_pretrained(folder)
    tasks = write_tasks(tmp_path / "tasks.jsonl", ["How many?", "What share is it?"] * 2)
    sizes = ["--questions", "4", "--batch-sizes", "1", "4", "--max-tokens", "8"]
    given = ["--model", folder, "--tasks", str(tasks), *sizes, "--max-model-len", "256"]
    exact = example.main([*given, "--precision", "exact"])
    assert exact.div_index == (-1,) * 4
    assert exact.avg_std_top1_prob == exact.avg_std_output_length == 0
    gc.collect()  # or the engine would end while the next one runs
    heal = example.main([*given, "--precision", "heal"])
    assert heal.avg_std_top1_prob > 0
