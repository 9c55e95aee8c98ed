"""Tokens per second inside vLLM, side by side in one run. Layer: bench.

    make bench-vllm     # python -m healpass.bench.serving MODEL, with the variables that it needs

One process per engine, all with the same pages and the same requests, which take turns: vLLM as it
is in BF16 and FP32, then HEAL. A round is a number of requests that arrive at once, each with a
prompt of its own; it counts from the first to the last token, prompts included. The first round of
each warms up. Imports `bench.run`, `environment`, `errors`, `integrations`; vLLM in the workers.
"""

from __future__ import annotations

import csv
import multiprocessing
import shlex
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from healpass.bench.page import put_between_marks
from healpass.bench.run import spread
from healpass.environment import collect
from healpass.errors import BenchError
from healpass.integrations.vllm.checking import Asked

#: vLLM as it is, by the dtype that it computes in; the others are HEAL's precisions.
PLAIN = {"vllm-bf16": "bfloat16", "vllm-fp32": "float32"}
ENGINES = (*PLAIN, "heal", "layercast", "exact")
BASELINES = ("vllm-bf16", "vllm-fp32")
COLUMNS = (
    "requests", "engine", "tokens_per_second", "p20", "p80", "to_bf16", "to_fp32", "model",
    "prompt", "new", "rounds", "processor", "threads", "torch", "vllm", "healpass", "command",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What every engine gets.

    Attributes:
        model: A folder or a name.
        prompt: Tokens of each prompt.
        new: Tokens of each answer.
        requests: How many arrive at once, one number per workload.
        rounds: Timed rounds of each.
        threads: Of each engine; they never run at the same time.
    """

    model: str
    prompt: int
    new: int
    requests: tuple[int, ...]
    rounds: int
    threads: int

    def asked(self, name: str) -> Asked:
        """The engine of a name, without prompts."""
        engine: dict[str, Any] = {
            "max_model_len": self.prompt + self.new,
            "max_num_seqs": max(self.requests),
            "enable_prefix_caching": False,
        }
        plain = {"dtype": PLAIN[name]} if name in PLAIN else {}
        return Asked(
            model=self.model,
            options=None if plain else {"precision": name},
            prompts=(),
            new_tokens=self.new,
            engine=engine | plain,
        )

    @property
    def name(self) -> str:
        """Of the model: the last two folders of a path."""
        return "/".join(Path(self.model).parts[-2:])

    def prompts(self, count: int, turn: int) -> list[list[int]]:
        """So many, none like another: no prefix is shared."""
        generator = torch.Generator().manual_seed(1000 * turn + count)
        drawn = torch.randint(0, 1000, (count, self.prompt), generator=generator)
        return [[int(token) for token in row] for row in drawn]


def serve(load: Load, name: str, calls: Connection) -> None:
    """A worker: start an engine, then answer (requests, turn) by seconds, until None comes.

    Args:
        load: What it gets.
        name: Of `ENGINES`.
        calls: To the process that measures.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    from healpass.integrations.vllm.answering import engine

    torch.set_num_threads(load.threads)
    llm = engine(load.asked(name))
    asked = SamplingParams(temperature=0, max_tokens=load.new, ignore_eos=True, detokenize=False)
    calls.send("ready")
    while (call := calls.recv()) is not None:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in load.prompts(*call)]
        start = time.perf_counter()
        llm.generate(prompts, asked, use_tqdm=False)
        calls.send(time.perf_counter() - start)


def measure(load: Load, engines: tuple[str, ...], console: Console) -> list[dict[str, Any]]:
    """Rows of the table: tokens per second by engine and number of requests.

    Args:
        load: What every engine gets.
        engines: Of `ENGINES`.
        console: Shows what runs.

    Raises:
        BenchError: An engine does not start.
    """
    context, ends = multiprocessing.get_context("spawn"), {}
    with console.status("starting") as status:
        for name in engines:
            status.update(f"starting {name} ...")
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(load, name, theirs), daemon=True).start()
            theirs.close()
            ends[name] = ours
            _answer(ours, name)
        found: dict[tuple[int, str], list[float]] = {}
        for count in load.requests:
            for turn in range(load.rounds + 1):  # the first warms up
                for name, end in ends.items():
                    status.update(f"{count} requests, round {turn} of {load.rounds}: {name} ...")
                    end.send((count, turn))
                    seconds = _answer(end, name)
                    if turn:
                        found.setdefault((count, name), []).append(count * load.new / seconds)
    for end in ends.values():
        end.send(None)
    return _rows(found)


def _answer(end: Connection, name: str) -> Any:
    try:
        return end.recv()
    except EOFError as error:
        raise BenchError(
            f"the engine {name} stopped.\nIts own message is above. A compiled engine needs "
            "VLLM_USE_AOT_COMPILE=0 in the environment, and five engines need about 4 GiB each."
        ) from error


def _rows(found: dict[tuple[int, str], list[float]]) -> list[dict[str, Any]]:
    rows = []
    for (count, name), rates in found.items():
        rate = spread(rates)
        row: dict[str, Any] = {"requests": count, "engine": name}
        row |= {"tokens_per_second": f"{rate['median']:.1f}"}
        row |= {"p20": f"{rate['low']:.1f}", "p80": f"{rate['high']:.1f}"}
        for column, baseline in zip(("to_bf16", "to_fp32"), BASELINES, strict=True):
            other = found.get((count, baseline))
            ratio = None if other is None else rate["median"] / spread(other)["median"]
            row[column] = "not measured" if ratio is None else f"{ratio:.2f}"
        rows.append(row)
    return rows


def provenance(load: Load) -> dict[str, Any]:
    """The columns that are equal in all rows of a run."""
    import vllm

    environment = collect()
    return {
        "model": load.name,
        "prompt": load.prompt,
        "new": load.new,
        "rounds": load.rounds,
        "processor": environment.cpu,
        "threads": load.threads,
        "torch": environment.packages["torch"],
        "vllm": vllm.__version__,
        "healpass": environment.packages["healpass"],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of a page: a row per number of requests and engine."""
    lines = ["| requests | engine | tokens/s | p20 to p80 | to BF16 | to FP32 |"]
    lines += ["| ---: | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        cells = (row["requests"], row["engine"], row["tokens_per_second"])
        rates = f"{row['p20']} to {row['p80']}"
        lines.append(
            "| " + " | ".join(map(str, (*cells, rates, row["to_bf16"], row["to_fp32"]))) + " |"
        )
    first = rows[0]
    where = ", ".join(
        f"{name} {first[name]}" for name in ("processor", "threads", "torch", "vllm")
    )
    return "\n".join([*lines, "", f"{where}. `{first['command']}`"])


def main(
    model: Annotated[str, typer.Argument(help="A model's folder or name.")],
    requests: Annotated[str, typer.Option(help="How many arrive at once.")] = "1,8,32",
    engines: Annotated[str, typer.Option(help=f"Of {', '.join(ENGINES)}.")] = ",".join(ENGINES),
    tokens: Annotated[str, typer.Option(help="Of a prompt, and of an answer.")] = "64,32",
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write the rows there.")] = None,
    page: Annotated[Path | None, typer.Option(help="Put the table between its marks.")] = None,
) -> None:
    """Measure, print, write.

    Args:
        model: A model's folder or name.
        requests: How many arrive at once, one number per workload.
        engines: Of `ENGINES`.
        tokens: Of a prompt, and of an answer.
        rounds: Timed rounds of each.
        csv_path: Gets the rows.
        page: Gets the table, between its marks.
    """
    names = tuple(engines.split(","))
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(ENGINES)}.")
    counts = tuple(int(count) for count in requests.split(","))
    prompt, new = (int(count) for count in tokens.split(","))
    load = Load(model, prompt, new, counts, rounds, torch.get_num_threads())
    console = Console()
    common = provenance(load) | {"command": _command(load, names)}
    rows = [row | common for row in measure(load, names, console)]
    table = Table("requests", "engine", "tokens/s", "to BF16", "to FP32")
    for row in rows:
        table.add_row(*(str(row[name]) for name in (*COLUMNS[:3], *COLUMNS[5:7])))
    console.print(table)
    if csv_path:
        with csv_path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if page:
        put_between_marks(page, markdown(rows))


def _command(load: Load, engines: tuple[str, ...]) -> str:
    words = ["python", "-m", "healpass.bench.serving", load.name]
    words += ["--requests", ",".join(map(str, load.requests)), "--engines", ",".join(engines)]
    words += ["--tokens", f"{load.prompt},{load.new}", "--rounds", str(load.rounds)]
    return shlex.join(words)


if __name__ == "__main__":
    typer.run(main)
