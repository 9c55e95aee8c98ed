"""The shape of LayerCast's evaluation in vLLM: does the batch size change the score?

    python examples/reproducibility_vllm.py --precision exact
    python examples/reproducibility_vllm.py --precision none        # vLLM as it is: the control

github.com/nanomaoli/llm_reproducibility answers a task greedily in vLLM, batch after batch, once
for each configuration, and compares the runs. Here is the same loop on a local file of tasks
(docs/professional-short-answers.md has the format), with the paper's metrics (arXiv 2506.09501) at
the end. All that HEAL changes is the arguments of the engine: `make_engine`, below.

The model is SmolLM2-135M-Instruct on CPU, fetched by pip, unless `--model` names another.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from vllm import LLM, SamplingParams

from healpass.integrations import smollm2
from healpass.integrations.vllm import engine_args
from healpass.study.judge.metrics import Metrics, compute_metrics
from healpass.study.plan import tasks as suites
from healpass.study.plan.prompts import token_ids
from healpass.study.plan.tasks import Task
from healpass.study.run.records import Output
from healpass.study.run.runner import choose_tasks


def make_engine(model: str, precision: str, dtype: str, length: int) -> LLM:
    """The engine as the repository starts it, or with HEAL."""
    engine: dict[str, Any] = {"max_model_len": length}
    if precision == "none":
        return LLM(model=model, dtype=dtype, enforce_eager=True, **engine)
    return LLM(**engine_args(model, precision=precision, compiled=False, engine=engine))


def answers(llm: LLM, tasks: Sequence[Task], batch_size: int, max_tokens: int) -> list[Output]:
    """A greedy answer to every task, batch by batch, each scored."""
    asked = SamplingParams(temperature=0.0, logprobs=5, max_tokens=max_tokens, seed=42)
    prompts = [{"prompt_token_ids": ids} for ids in token_ids(llm.get_tokenizer(), tasks)]
    found = []
    for start in range(0, len(tasks), batch_size):
        llm.reset_prefix_cache()
        batch = slice(start, start + batch_size)
        outputs = llm.generate(prompts[batch], sampling_params=asked, use_tqdm=False)
        for task, output in zip(tasks[batch], outputs, strict=True):
            (reply,) = output.outputs
            best = [max(found.logprob for found in row.values()) for row in reply.logprobs]
            right = suites.score(task, reply.text).correct
            probabilities = tuple(map(math.exp, best))
            found.append(Output(tuple(reply.token_ids), top1_probs=probabilities, correct=right))
    return found


def table_of(precision: str, metrics: Metrics) -> Table:
    """The paper's metrics over the batch sizes."""
    table = Table(
        title=f"{precision}: {metrics.prompts} tasks, {', '.join(metrics.configurations)}"
    )
    table.add_column("metric")
    table.add_column("found", justify="right")
    for name, value in metrics.to_dict().items():
        if name not in ("configurations", "prompts", "First_Divergence"):
            table.add_row(name, str(value))
    return table


def main(argv: Sequence[str] | None = None) -> Metrics:
    """Answer at every batch size, and print the metrics."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=None, help="a folder or a hub id")
    parser.add_argument("--precision", default="exact", help="exact, layercast, heal, or none")
    parser.add_argument("--dtype", default="bfloat16", help="of vLLM as it is")
    parser.add_argument("--tasks", default=suites.SUITE, help="a file of tasks")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--max-model-len", type=int, default=1024)
    options = parser.parse_args(argv)
    model = options.model or str(smollm2.fetch())
    llm = make_engine(model, options.precision, options.dtype, options.max_model_len)
    tasks = choose_tasks(options.tasks, options.questions)
    runs = {
        f"batch size {size}": answers(llm, tasks, size, options.max_tokens)
        for size in options.batch_sizes
    }
    metrics = compute_metrics(runs)
    Console().print(table_of(options.precision, metrics))
    return metrics


if __name__ == "__main__":
    main()
