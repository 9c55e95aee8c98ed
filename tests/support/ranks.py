"""What a rank of a distributed test runs: a tiny model, data-parallel or tensor-parallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from healpass import HealConfig
from tests.support.examples import load_example
from tests.support.rewriting import Rewritten
from tests.support.tiny_llama import make_llama

#: FP32-equivalent end to end.
OPTIONS = {"kv": "int24", "outputs": "fp32"}
ROWS = torch.arange(1, 37).reshape(4, 9) * 7 % 90 + 1


def compile_blocks(model: Any, backend: str | Callable[..., Any] | None = None) -> None:
    """As torchtitan does: every block by itself, so that hooks between blocks stay outside.

    Without a backend the graphs are rewritten and run by torch; `"heal"` compiles.
    """
    compiler = Rewritten(model, HealConfig(**OPTIONS), aot=True)
    for block in model.model.layers:
        if backend == "heal":
            block.compile(backend="heal", fullgraph=True, options=OPTIONS)
        else:
            block.compile(backend=compiler._backend, fullgraph=True)


def gradients(model: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over some rows, by parameter."""
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole(gradient: Any) -> torch.Tensor:
    """A shard's full tensor; any other tensor as it is."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def checkpointed(model: Any) -> None:
    """Let every block compute its activations again in the backward."""
    blocks = model.model.layers
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)


def wrapped(model: Any, how: str) -> Any:
    """The model under DDP or FSDP2."""
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def data_parallel(rank: int, ranks: int, how: str, backend: str | None) -> dict[str, torch.Tensor]:
    """The gradients that the ranks agree on, each with its part of the rows.

    `how` is `ddp`, `fsdp`, or `checkpoint`: FSDP2 in torchtitan's order, which is activation
    checkpointing, then the compiler, then the shards.
    """
    model = make_llama(torch.float32)
    if how == "checkpoint":
        checkpointed(model)
    compile_blocks(model, backend)
    found = gradients(wrapped(model, how), ROWS.chunk(ranks)[rank])
    return {plain_name(name): gradient for name, gradient in found.items()}


def plain_name(name: str) -> str:
    """A parameter's name without what DDP and checkpointing put into it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


# ---------------------------------------------------------------- the table of examples/rank_bits


def rewritten(model: Any, options: dict[str, Any]) -> Any:
    """What calls a model with its graphs rewritten, and run by torch."""
    return Rewritten(model, HealConfig(**options), aot=True)


def table_rank(rank: int, ranks: int) -> dict[str, Any]:
    """What a process of the example finds, without Inductor."""
    return load_example("rank_bits").measure(rank, ranks, rewritten)


# --------------------------------------------------------------------------- tensor parallel


def four_heads(**changes: Any) -> Any:
    """A model that four ranks can share: every rank has a head of queries, keys and values."""
    model = make_llama(num_key_value_heads=4, attention_bias=True, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def parallelized(model: Any, ranks: int) -> Any:
    """Attention and MLP cut over the ranks, as the plans of torchtitan and transformers do."""
    load_example("rank_bits").parallelize(model, ranks)
    return model


def logits_and_gradients(model: Any, precision: str) -> dict[str, torch.Tensor]:
    """FP32 logits and gradients of one step; `bf16` leaves torch alone.

    The loss is outside: logits that the graph itself reads again are handed out in BF16.
    """
    call = model
    if precision != "bf16":
        kv = "int24" if precision == "heal" else None
        config = HealConfig(precision=precision, outputs="fp32", kv=kv)
        call = Rewritten(model, config, aot=True)
    logits = call(input_ids=ROWS, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ROWS[:, 1:].flatten()
    )
    loss.backward()
    assert precision == "bf16" or "linear" not in call.kept
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach()}


def tensor_parallel(rank: int, ranks: int, precision: str) -> dict[str, torch.Tensor]:
    """Logits and gradients of a model whose layers are cut over the ranks."""
    torch._dynamo.reset()
    return logits_and_gradients(parallelized(four_heads(), ranks), precision)


def sum_with_a_nan(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """A product with K cut over the ranks; the last rank's part has a NaN in its first row."""
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    a[0, 0] = float("nan") if rank == ranks - 1 else 1
    group = dist.group.WORLD.group_name
    return {"product": torch.ops.heal.summed_mm(a, b, group, "exact5")}


# ------------------------------------------------------------------------------------ processes


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    try:
        torch.save(work(rank, ranks, *arguments), f"{folder}/rank{rank}")
    finally:
        dist.destroy_process_group()


def on_ranks(
    ranks: int, folder: Path, work: Callable[..., Any], *arguments: Any
) -> list[dict[str, torch.Tensor]]:
    """What `work(rank, ranks, *arguments)` returns in every process of a gloo group."""
    folder.mkdir(exist_ok=True)
    mp.spawn(_rank, (ranks, str(folder), work, arguments), nprocs=ranks)
    return [torch.load(folder / f"rank{rank}") for rank in range(ranks)]
