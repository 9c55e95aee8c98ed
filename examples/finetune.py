"""Fine-tune with transformers' Trainer; one line of it is HEAL. With `--lora`, a PEFT adapter.

    python examples/finetune.py [--steps 10] [--lora] [--precision heal]

`TrainingArguments(torch_compile_backend="heal")` cannot work, because accelerate keeps a closed
list of backends; `HealCallback` takes its place. The same line serves TRL's trainers, which derive
from Trainer: `SFTTrainer(..., callbacks=[HealCallback()])`.

Two layers of SmolLM2-135M-Instruct learn the text of this repository's licence, on CPU. Weights
are FP32, as they should be for an optimizer; `bf16=True` in the arguments would train in autocast.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

TEXT = Path(__file__).parents[1] / "LICENSE"


def rows_of(tokenizer: Any, length: int) -> list[dict[str, torch.Tensor]]:
    """The text in rows of `length` tokens, each its own label."""
    ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def with_adapter(model: Any) -> Any:
    """LoRA on the attention's projections; the model's own weights stay as they are."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(model: Any, rows: Any, steps: int, precision: str) -> list[float]:
    """What a script does anyway, and `callbacks=`. Returns the losses."""
    from transformers import Trainer, TrainingArguments

    from healpass.integrations.trainer import HealCallback

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            callbacks=[HealCallback(precision=precision, kv="int24")],
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the loss of every step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=2, help="of SmolLM2 (30 are all)")
    parser.add_argument("--length", type=int, default=32, help="tokens per row")
    parser.add_argument("--lora", action="store_true", help="train an adapter")
    parser.add_argument("--precision", default="heal", help="heal, exact or layercast")
    options = parser.parse_args(argv)

    from healpass.integrations import smollm2

    model, tokenizer = smollm2.load(torch.float32, layers=options.layers)
    if options.lora:
        model = with_adapter(model)
    rows = rows_of(tokenizer, options.length)
    losses = train(model, rows, options.steps, options.precision)
    console = Console()
    for step, loss in enumerate(losses, 1):
        console.print(f"step {step:3}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
