"""What does `precision="exact"` cost? FP32, BF16 and exact, timed in one run.

SmolLM2-135M-Instruct (fetched on the first run), compiled by Inductor three times: in FP32, in
BF16, and in BF16 weights with `precision="exact"`. Each row is a shape: the prefill of so many
tokens, or the decode of one token with a static cache. The rounds of the three take turns,
the table has the fastest of each, and what counts is the ratio: times depend on the machine.

    python examples/exact_cost.py                      # the whole model; compiling takes minutes
    python examples/exact_cost.py --layers 4 --prefill 16 128

A model that is cut to few layers keeps its head, which then weighs more than it would. It needs
no GPU.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import StaticCache

from healpass.integrations import smollm2
from healpass.integrations.transformers import HealCache

#: Calls before the first that counts.
WARM_UP = 2


@dataclass(frozen=True)
class Contender:
    """One arithmetic: the weights' dtype, the backend's options, and its cache."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    cache: Callable[[Any, int], Any]


def plain_cache(config: Any, length: int) -> Any:
    """The cache of transformers: keys and values in the model's dtype."""
    return StaticCache(config=config, max_cache_len=length)


CONTENDERS = (
    Contender("FP32", torch.float32, {"precision": "traced"}, plain_cache),
    Contender("BF16", torch.bfloat16, {"precision": "traced"}, plain_cache),
    Contender("exact", torch.bfloat16, {"precision": "exact", "outputs": "fp32"}, HealCache),
)


@dataclass(frozen=True)
class Shape:
    """A row of the table: `tokens` at once, after `past` tokens in a cache (None: no cache)."""

    tokens: int
    past: int | None = None

    def __str__(self) -> str:
        if self.past is None:
            return f"prefill of {self.tokens}"
        return f"decode after {self.past}"


def step(contender: Contender, layers: int | None, shape: Shape, steps: int) -> Callable[[], Any]:
    """A call that runs the compiled model once on the shape, at most `steps` times."""
    model, _ = smollm2.load(contender.dtype, layers=layers)
    compiled = torch.compile(model, backend="heal", options=contender.options, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (1, (shape.past or 0) + shape.tokens), generator=generator)
    if shape.past is None:
        return lambda: compiled(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    cache = contender.cache(model.config, shape.past + steps)
    with warnings.catch_warnings():  # what is in the cache does not matter here
        warnings.filterwarnings("ignore", message="HealCache is filled by a model")
        model(input_ids=ids[:, : shape.past], past_key_values=cache, use_cache=True)
    token = ids[:, shape.past :]
    return lambda: compiled(input_ids=token, past_key_values=cache, use_cache=True).logits


def fastest(
    calls: Sequence[Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> list[float]:
    """Seconds of each call, the least of rounds that take turns, after two calls to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + WARM_UP):
        for call, spent in zip(calls, times, strict=True):
            start = clock()
            call()
            if turn >= WARM_UP:
                spent.append(clock() - start)
    return [min(spent) for spent in times]


def measure(options: argparse.Namespace, shapes: Sequence[Shape], console: Console) -> Table:
    """The table: a row for each shape."""
    layers, rounds = options.layers, options.rounds
    clock = time.process_time if options.cpu_time else time.perf_counter
    table = Table(
        title=f"SmolLM2-135M, {layers or 'all'} layers, {torch.get_num_threads()} threads"
    )
    headings = ("shape", *(f"{c.name} ms" for c in CONTENDERS), "exact / FP32", "exact / BF16")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "shape" else "right")
    for shape in shapes:
        torch._dynamo.reset()
        with console.status(f"{shape}: compiling"):
            calls = [step(c, layers, shape, rounds + WARM_UP) for c in CONTENDERS]
            fp32, bf16, exact = fastest(calls, rounds, clock)
        milliseconds = (f"{1000 * seconds:.1f}" for seconds in (fp32, bf16, exact))
        table.add_row(str(shape), *milliseconds, f"{exact / fp32:.2f}", f"{exact / bf16:.2f}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the model, time the shapes, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, help="of the model's 30")
    parser.add_argument("--prefill", type=int, nargs="*", default=[16, 128, 512], help="tokens")
    parser.add_argument("--decode", type=int, nargs="*", default=[128], help="tokens before it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds: for a machine that others use, too"
    )
    options = parser.parse_args(argv)
    console = Console()
    smollm2.fetch(console=console)
    shapes = [Shape(1, past) for past in options.decode] + [Shape(n) for n in options.prefill]
    with torch.no_grad():
        console.print(measure(options, shapes, console))


if __name__ == "__main__":
    main()
