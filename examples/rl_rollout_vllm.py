"""Reinforcement learning with two engines: vLLM samples, transformers trains. Is the ratio 1?

    python examples/rl_rollout_vllm.py [--steps 2] [--new-tokens 16]

Each step samples seeded replies in vLLM's continuous batch, scores the same tokens in one training
pass in transformers, and takes a step of policy gradient; the next engine starts from the new
weights (plain vLLM on CPU packs its weights, and takes no others while it runs).

The importance ratio `exp(trainer - rollout)` of each token should be 1: the weights are the same.
By default it is not, since two engines add in other orders, and trainers clip or weigh it. Printed
is its range, by arithmetic: with `exact` it is exactly 1 for every token of every step. Most of
the time goes to torch, which compiles the training pass.

The model is a tiny random Llama, so that the rewards are of no matter; the environment is vLLM's
(docs/serving.md).
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Before vLLM is imported: the engine in this process, which ends when it is collected.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from healpass.integrations.transformers import heal_model
from healpass.integrations.vllm import engine_args

VOCABULARY = 256
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}
#: Of one length, so that the training pass takes them in one batch without padding.
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4])
#: Arithmetic -> HEAL's options; None leaves vLLM and torch alone, both in BF16.
WAYS: dict[str, dict[str, str] | None] = {
    "exact": {"precision": "exact"},
    "heal": {"precision": "heal"},
    "BF16": None,
}


@dataclass(frozen=True)
class Reply:
    """A prompt, sampled tokens, and the log-probability that the sampler gave to each."""

    prompt: list[int]
    tokens: list[int]
    log_probabilities: Tensor


def make_model() -> Any:
    """The same random BF16 model whenever it is called."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def make_engine(folder: str, options: dict[str, str] | None) -> LLM:
    """The sampler, of the model in a folder."""
    common = {"max_model_len": 128, "skip_tokenizer_init": True}
    if options is None:
        return LLM(model=folder, dtype="bfloat16", enforce_eager=True, **common)
    return LLM(**engine_args(folder, compiled=False, engine=common, **options))


def rollout(llm: LLM, new_tokens: int, step: int) -> list[Reply]:
    """A seeded reply to each prompt, from one continuous batch."""
    asked = [
        SamplingParams(
            temperature=1.0, seed=100 * step + number, max_tokens=new_tokens, ignore_eos=True,
            logprobs=0, detokenize=False,
        )
        for number in range(len(PROMPTS))
    ]  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
    replies = []
    for prompt, output in zip(PROMPTS, llm.generate(prompts, asked, use_tqdm=False), strict=True):
        tokens, ranked = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        found = [row[token].logprob for row, token in zip(ranked, tokens, strict=True)]
        replies.append(Reply(prompt, tokens, torch.tensor(found)))
    return replies


def score(model: Any, replies: Sequence[Reply]) -> Tensor:
    """Log-probability `[B, T]` of each sampled token, in one training pass."""
    ids = torch.tensor([reply.prompt + reply.tokens for reply in replies])
    start = len(PROMPTS[0])
    logits = model(input_ids=ids, use_cache=False).logits[:, start - 1 : -1]
    is_healed = logits.dtype == torch.float32  # `heal_model` hands logits out in FP32
    log_softmax = torch.ops.heal.log_softmax if is_healed else torch.log_softmax
    return log_softmax(logits.float(), -1).gather(-1, ids[:, start:, None])[..., 0]


def reward(reply: Reply) -> float:
    """How many tokens are even: something to learn."""
    return sum(token % 2 == 0 for token in reply.tokens) / len(reply.tokens)


def sampled(model: Any, options: dict[str, str] | None, new_tokens: int, step: int) -> list[Reply]:
    """Replies of an engine that starts from the trainer's weights of this step."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        llm = make_engine(folder, options)
    replies = rollout(llm, new_tokens, step)
    del llm
    gc.collect()  # or the engine would end while the next one runs
    return replies


def train(options: dict[str, str] | None, steps: int, new_tokens: int) -> Tensor:
    """Steps of policy gradient; the importance ratio of every token that was sampled."""
    model = make_model()
    model = model if options is None else heal_model(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ratios = []
    for step in range(steps):
        replies = sampled(model, options, new_tokens, step)
        rewards = torch.tensor([reward(reply) for reply in replies])
        drawn = torch.stack([reply.log_probabilities for reply in replies])
        ratio = (score(model, replies) - drawn).exp()
        (-ratio * (rewards - rewards.mean())[:, None]).mean().backward()
        ratios.append(ratio.detach().flatten())
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(ratios)


def table_of(found: dict[str, Tensor]) -> Table:
    """A row per arithmetic."""
    table = Table(title="Importance ratio of a sampled token: training pass / rollout in vLLM")
    for heading in ("arithmetic", "tokens", "not 1", "smallest", "largest"):
        table.add_column(heading, justify="left" if heading == "arithmetic" else "right")
    for name, ratio in found.items():
        different = str(int((ratio != 1).sum()))
        ends = (f"{float(ratio.min()):.7g}", f"{float(ratio.max()):.7g}")
        table.add_row(name, str(ratio.numel()), different, *ends)
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Train in every arithmetic, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=16, help="per reply")
    options = parser.parse_args(argv)
    found = {}
    for name, way in WAYS.items():
        torch._dynamo.reset()
        found[name] = train(way, options.steps, options.new_tokens)
    Console().print(table_of(found))
    return found


if __name__ == "__main__":
    main()
