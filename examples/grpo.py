"""An on-policy step of TRL's GRPO: is the importance ratio 1, as it should be?

    python examples/grpo.py [--precision exact] [--fused]

GRPO samples replies with a cache, token by token, and scores the same tokens in one training pass
of the same weights. Printed is how far the log-probabilities of both lie apart, and the range of
the importance ratio. With `exact` both passes find the same bits: 0, and 1 to 1.

Two code paths of the same model are the trap here, and `Scorer` closes both. TRL scores with a
fused head of its own, which multiplies by the output weights in `torch.mm(..., out=)`: the
compiled graph ends there, and the product is torch's, not HEAL's (`--fused` shows what that
costs). And it gives no positions, so that a prompt padded on the left is rotated by other angles
than in `generate`.

The model is SmolLM2-135M-Instruct (its first layers, FP32 weights) on CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from healpass.integrations.trainer import HealCallback

PROMPTS = ("Name a river.", "Why do cats purr? Answer in a few words.")
SAMPLES = 2


@dataclass
class Passes:
    """Log-probabilities `[B, T]` of the sampled tokens, in the sampling and the training pass."""

    sampled: list[Tensor] = field(default_factory=list)
    scored: list[Tensor] = field(default_factory=list)

    def difference(self) -> Tensor:
        """Trainer minus sampler: the logarithm of the importance ratio."""
        return torch.cat(self.scored) - torch.cat(self.sampled)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability `[B, T]` of each token, from logits `[B, T, V]`."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def sampler(new_tokens: int) -> Callable[[list[str], Any], dict[str, Any]]:
    """TRL's `rollout_func`: sample a reply to each prompt, with its log-probabilities."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        batch = trainer.processing_class(
            prompts, return_tensors="pt", padding=True, padding_side="left"
        )
        with torch.no_grad():
            made = trainer.model.generate(
                **batch,
                do_sample=True,
                top_k=0,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = made.sequences[:, batch["input_ids"].shape[1] :]
        found = log_probabilities(torch.stack(made.logits, 1), tokens)
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        return {
            "prompt_ids": [ids[mask].tolist() for ids, mask in rows],
            "completion_ids": tokens.tolist(),
            "logprobs": found.tolist(),
        }

    return rollout


class Scorer(GRPOTrainer):
    """GRPO that scores with the model's own logits, at the positions that `generate` uses.

    Args:
        passes: Takes the log-probabilities of both passes.
        fused: Score as TRL does by itself.
        **arguments: Those of `GRPOTrainer`.
    """

    def __init__(self, passes: Passes, fused: bool, **arguments: Any) -> None:
        self.passes, self.fused = passes, fused
        super().__init__(**arguments)
        if not fused:
            vars(self.model).pop("forward", None)  # TRL's, with its head, where TRL has one

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.passes.sampled.append(inputs["sampling_per_token_logps"])  # shuffled like its rows
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.fused:
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        else:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            logits = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
            ).logits[:, -logits_to_keep - 1 : -1]
            scores = log_probabilities(logits / self.temperature, input_ids[:, -logits_to_keep:])
            entropy = torch.distributions.Categorical(logits=logits.detach().float()).entropy()
            found = (scores, entropy, None)
        self.passes.scored.append(found[0].detach())
        return found


def step(model: Any, tokenizer: Any, new_tokens: int, precision: str, fused: bool) -> Passes:
    """One step of GRPO on the prompts; the reward is of no matter here."""
    from datasets import Dataset

    passes = Passes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=len(PROMPTS) * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=new_tokens,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Scorer(
            passes,
            fused,
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            rollout_func=sampler(new_tokens),
            callbacks=[HealCallback(precision=precision)],
        )
        trainer.train()
    return passes


def main(argv: Sequence[str] | None = None) -> None:
    """Train one step, and print how far the two passes lie apart."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--precision", default="exact", help="exact, heal, layercast or traced")
    parser.add_argument("--fused", action="store_true", help="score with TRL's fused head")
    parser.add_argument("--layers", type=int, default=2, help="of SmolLM2 (30 are all)")
    parser.add_argument("--vocabulary", type=int, default=None, help="logits of so many tokens")
    parser.add_argument("--new-tokens", type=int, default=8, help="per reply")
    options = parser.parse_args(argv)

    from healpass.integrations import smollm2

    model, tokenizer = smollm2.load(
        torch.float32, layers=options.layers, vocabulary=options.vocabulary
    )
    passes = step(model, tokenizer, options.new_tokens, options.precision, options.fused)
    difference = passes.difference()
    ratio = difference.exp()
    Console().print(
        f"{options.precision}{', fused head' if options.fused else ''}: {difference.numel()} "
        f"tokens, largest difference {float(difference.abs().max()):.2g}, importance ratio "
        f"{float(ratio.min()):.7g} to {float(ratio.max()):.7g}"
    )


if __name__ == "__main__":
    main()
