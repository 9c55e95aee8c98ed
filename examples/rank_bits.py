"""One batch on 1, 2 and 4 processes: which gradients and logits keep their bits?

    python examples/rank_bits.py [--ranks 1 2 4]

The batch is cut into four micro-batches once, and the processes share them. With `exact`,
`ExactGradients` adds integers, so the gradients of all parameters have the same bits however many
processes there are. With `heal` they are added in FP32, in another order for every number of
processes; printed is how far that moves them, over the bound of two orders of addition.

The second table cuts the *layers* over the processes (tensor parallel), where the sum over
processes is inside of every layer: BF16, heal and exact, logits against those of one process.

The model is a small random Llama on CPU with gloo; Inductor compiles it in every process, which
takes some minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

MICRO_BATCHES, ROWS, LENGTH, VOCABULARY = 4, 2, 12, 64
#: Arithmetic -> options of HEAL; None leaves torch alone, under BF16 autocast.
WAYS: dict[str, dict[str, Any] | None] = {
    "BF16": None,
    "heal": {"precision": "heal", "kv": "int24", "outputs": "fp32"},
    "exact": {"precision": "exact", "outputs": "fp32"},
}
#: Returns what calls a model, compiled with some options.
Compile = Callable[[Any, dict[str, Any]], Any]


def make_model() -> Any:
    """One block with a head for each of four processes, FP32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def micro_batch(index: int) -> Tensor:
    """Tokens `[ROWS, LENGTH]`."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)


def compile_model(model: Any, options: dict[str, Any]) -> Any:
    """The line that is HEAL."""
    model.compile(backend="heal", options=options)
    return model


def backward(call: Any, rank: int, ranks: int, take: Callable[[], None]) -> None:
    """Gradients of this process's micro-batches, each handed to `take`."""
    for index in range(rank, MICRO_BATCHES, ranks):
        batch = micro_batch(index)
        call(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        take()


def exact_gradients(model: Any, call: Any, rank: int, ranks: int) -> list[Tensor]:
    """The mean over all micro-batches, added as integers."""
    from healpass.integrations.data_parallel import ExactGradients

    gradients = ExactGradients(model.parameters(), MICRO_BATCHES)
    backward(call, rank, ranks, gradients.take)
    gradients.reduce(dist.group.WORLD)
    return [parameter.grad for parameter in model.parameters()]


def float_gradients(model: Any, call: Any, rank: int, ranks: int) -> tuple[list[Tensor], ...]:
    """The mean over all micro-batches, added in FP32, and the mean of their magnitudes."""
    means = [torch.zeros_like(p) for p in model.parameters()]
    magnitudes = [torch.zeros_like(p) for p in model.parameters()]

    def take() -> None:
        for parameter, mean, magnitude in zip(model.parameters(), means, magnitudes, strict=True):
            mean += parameter.grad / MICRO_BATCHES
            magnitude += parameter.grad.abs() / MICRO_BATCHES
            parameter.grad = None

    backward(call, rank, ranks, take)
    for tensor in means + magnitudes:
        dist.all_reduce(tensor)
    return means, magnitudes


def parallelize(model: Any, ranks: int) -> None:
    """Cut attention and MLP over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)


def logits(way: str, ranks: int, compile_with: Compile) -> Tensor:
    """Logits `[ROWS, LENGTH, VOCABULARY]` of a model cut over the processes."""
    torch._dynamo.reset()
    model, options = make_model(), WAYS[way]
    if ranks > 1:
        parallelize(model, ranks)
    call = model if options is None else compile_with(model, options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=options is None):
        return call(input_ids=micro_batch(0), use_cache=False).logits.float()


def measure(rank: int, ranks: int, compile_with: Compile = compile_model) -> dict[str, Any]:
    """What one process of a group finds: gradients, and logits by arithmetic."""
    found: dict[str, Any] = {"logits": {way: logits(way, ranks, compile_with) for way in WAYS}}
    for way, collect in (("heal", float_gradients), ("exact", exact_gradients)):
        torch._dynamo.reset()
        model = make_model()
        found[way] = collect(model, compile_with(model, WAYS[way] or {}), rank, ranks)
    return found


def differing(a: Tensor, b: Tensor) -> int:
    """Elements that differ in a bit."""
    return int((a.contiguous().view(torch.int32) != b.contiguous().view(torch.int32)).sum())


def order_ratio(means: list[Tensor], alone: list[Tensor], magnitudes: list[Tensor]) -> float:
    """How far two orders of addition lie apart, over how far they may.

    A sum of n terms in FP32 is within `(n - 1) u` of the exact one, relative to the sum of the
    magnitudes, to first order and in any order; so two are within twice that, with u = 2**-24.
    The divisions by four are exact.
    """
    bound = 2 * (MICRO_BATCHES - 1) * 2.0**-24
    ratios = []
    for mean, one, magnitude in zip(means, alone, magnitudes, strict=True):
        distance = (mean - one).abs()
        ratios.append(torch.where(distance == 0, 0.0, distance / (bound * magnitude)).max())
    return float(torch.stack(ratios).max())


def digest(tensors: list[Tensor]) -> str:
    """Twelve digits of the SHA-256 of all bits."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()[:12]


def gradient_table(found: dict[int, dict[str, Any]]) -> Table:
    """A row per arithmetic and number of processes."""
    table = Table(title=f"Gradients of {MICRO_BATCHES} micro-batches, data parallel")
    for heading in ("arithmetic", "ranks", "digest", "elements that differ", "observed/bound"):
        table.add_column(heading, justify="left" if heading == "arithmetic" else "right")
    first = min(found)
    for way in ("heal", "exact"):
        for ranks, results in found.items():
            mine, alone = results[way], found[first][way]
            ratio = "-"
            if way == "heal":
                ratio = f"{order_ratio(mine[0], alone[0], mine[1]):.3f}"
                mine, alone = mine[0], alone[0]
            changed = sum(differing(a, b) for a, b in zip(mine, alone, strict=True))
            total = sum(tensor.numel() for tensor in mine)
            table.add_row(way, str(ranks), digest(mine), f"{changed} of {total}", ratio)
    return table


def logit_table(found: dict[int, dict[str, Any]]) -> Table:
    """A row per arithmetic and number of processes."""
    table = Table(title="Logits, layers cut over the ranks (tensor parallel)")
    for heading in ("arithmetic", "ranks", "elements that differ", "by up to"):
        table.add_column(heading, justify="left" if heading == "arithmetic" else "right")
    first = min(found)
    for way in WAYS:
        for ranks, results in found.items():
            mine, alone = results["logits"][way], found[first]["logits"][way]
            changed = f"{differing(mine, alone)} of {mine.numel()}"
            table.add_row(way, str(ranks), changed, f"{float((mine - alone).abs().max()):.2g}")
    return table


def process(rank: int, ranks: int, folder: str) -> None:
    """One process: the first of each group saves what it found."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    found = measure(rank, ranks)
    if rank == 0:
        torch.save(found, f"{folder}/{ranks}")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Start groups of processes, and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], choices=(1, 2, 4))
    options = parser.parse_args(argv)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted(options.ranks):
            torch.multiprocessing.spawn(process, (ranks, folder), nprocs=ranks)
            found[ranks] = torch.load(Path(folder) / str(ranks))
    console = Console()
    console.print(gradient_table(found))
    console.print(logit_table(found))


if __name__ == "__main__":
    main()
