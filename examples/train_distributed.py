"""A plain PyTorch loop, compiled block by block; on one process, or several with DDP or FSDP2.

    python examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py               # DDP
    torchrun --nproc-per-node 2 examples/train_distributed.py --how fsdp

Every transformer block is compiled by itself, as torchtitan does: one compilation serves all
blocks, and the hooks that gather weights and reduce gradients stay between the graphs. Gradients
are averaged in FP32, so the printed losses of one and of two processes agree to about six digits;
they are not equal bit for bit (rank_bits.py is about that).

The model is a small random Llama; the data are numbers that count. It runs on CPU with gloo.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Rows of a step, over all processes; so the number of processes does not change the work.
ROWS, LENGTH, VOCABULARY = 8, 16, 64


def make_model() -> Any:
    """Two blocks, FP32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def compile_blocks(model: Any) -> None:
    """The lines that are HEAL."""
    for block in model.model.layers:
        block.compile(backend="heal", fullgraph=True, options={"kv": "int24", "outputs": "fp32"})


def distribute(model: Any, how: str) -> Any:
    """Nothing, DDP, or FSDP2 with one shard per block."""
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.model.layers:
            fully_shard(block)
        return fully_shard(model)
    return model


def batches(steps: int) -> Iterator[Tensor]:
    """Rows that count upwards from different starts, `[ROWS, LENGTH]`."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        start = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
        yield (start + torch.arange(LENGTH)) % VOCABULARY


def train(model: Any, steps: int, rank: int, ranks: int) -> list[float]:
    """The usual loop on this process's rows; returns the mean losses of all processes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches(steps):
        mine = batch.chunk(ranks)[rank]
        loss = model(input_ids=mine, labels=mine, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and let the first process print the losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    launched = "RANK" in os.environ
    default = "ddp" if launched else "single"
    parser.add_argument("--how", choices=("single", "ddp", "fsdp"), default=default)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args(argv)
    if options.how != "single" and not launched:
        parser.error(f"--how {options.how} needs several processes: start it with torchrun")
    rank, ranks = 0, 1
    if options.how != "single":
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        model = make_model()
        compile_blocks(model)
        losses = train(distribute(model, options.how), options.steps, rank, ranks)
    finally:
        if options.how != "single":
            dist.destroy_process_group()
    if rank == 0:
        for step, loss in enumerate(losses, 1):
            print(f"step {step:2}  loss {loss:.6f}")


if __name__ == "__main__":
    main()
