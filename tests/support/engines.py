"""Engines of tiny models with SmolLM2's widths, and what they answer, to the last bit."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from healpass.integrations.vllm import engine_args

VOCABULARY, NEW = 512, 8
#: Widths of SmolLM2-135M: with smaller ones vLLM's own sums happen to agree.
WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.06,
}
#: The square root of this width, which scales embeddings, is none of BF16's numbers.
GEMMA = {
    "hidden_size": 640,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "sliding_window": 24,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 448}
#: Scalings of rotary embeddings. At this base torch's powers differ between instruction sets for
#: the second frequency, which turns keys by many radians.
THETA = 9e4
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "yarn": {"factor": 3.0, "original_max_position_embeddings": 171},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
}


def rope(kind: str) -> str:
    """The name of a Llama with that scaling."""
    return f"llama with {kind} frequencies"


MODELS: dict[str, Any] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {"tie_word_embeddings": True}),
    # Heads that two ranks can share.
    "even": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2},
    ),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {"sliding_window": 24}),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, GEMMA),
    "gemma3": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig, {"use_qk_norm": True}),
    "mixtral": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        {"num_local_experts": 4, "intermediate_size": 448},
    ),
    "qwen2_moe": (
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig,
        EXPERTS | {"shared_expert_intermediate_size": 448},
    ),
    "qwen3_moe": (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        EXPERTS | {"head_dim": 64, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        hf.GptOssForCausalLM,
        hf.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 448}
        | {"head_dim": 64, "sliding_window": 24},
    ),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, {}),
    **{
        rope(kind): (
            hf.LlamaForCausalLM,
            hf.LlamaConfig,
            {
                "num_hidden_layers": 1,
                "rope_parameters": {"rope_type": kind, "rope_theta": THETA} | more,
            },
        )
        for kind, more in {**ROPES, "dynamic": {"factor": 3.0}}.items()
    },
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {"head_dim": 64}),
}
#: Families whose answers are those of transformers.
SAME_AS_TRANSFORMERS = (
    *("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"),
)
#: Those of them whose models compute something beside their layers, which only a compiler sees.
COMPILED = ("qwen2_moe",)
#: What one request answers: its tokens, and their log-probabilities.
Answer = tuple[tuple[int, ...], tuple[float, ...]]


def make_model(family: str) -> Any:
    """The same random BF16 model whenever it is called."""
    model, config, changes = MODELS[family]
    torch.manual_seed(1)
    made = model._from_config(config(**WIDTHS | changes), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(0.2 * torch.randn(weight.shape).to(torch.bfloat16))
    return made


def save_model(family: str, folder: Path) -> str:
    """A folder that vLLM loads."""
    make_model(family).save_pretrained(folder)
    return str(folder)


def prompts() -> list[list[int]]:
    """Sixteen, of 1 to 90 tokens; some begin alike."""
    generator = torch.Generator().manual_seed(3)

    def some(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    shared = some(64)
    different = [some(count) for count in (1, 3, 7, 16, 17, 33, 64, 90, 2, 48, 21)]
    alike = [shared + some(count) for count in (5, 11, 26)]
    return [*different, *alike, shared[:40] + some(9), shared]


@dataclass
class Engine:
    """An engine, and what happened in it.

    Attributes:
        model: A folder.
        precision: HEAL's; None for vLLM as it is.
        sampling: More of `SamplingParams`, for each request by its number.
        arguments: More of the engine's.
    """

    model: str
    precision: str | None = "exact"
    kv: str | None = None
    compiled: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        common = {
            "max_model_len": 256,
            "max_num_seqs": 16,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "seed": 0,
        } | self.arguments
        if self.precision is None:
            plain = {"dtype": "bfloat16", "enforce_eager": True} | common
            self.llm = LLM(model=self.model, **plain)
            return
        options = {"precision": self.precision} | ({"kv": self.kv} if self.kv else {})
        self.llm = LLM(**engine_args(self.model, compiled=self.compiled, engine=common, **options))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        del self.llm
        gc.collect()
        torch._dynamo.reset()

    def asked(self, number: int) -> SamplingParams:
        """How request `number` is sampled: greedily, unless `sampling` says more."""
        seeded = {"seed": 100 + number} if self.sampling.get("temperature") else {}
        given = {"temperature": 0, "max_tokens": NEW, "logprobs": 0, "ignore_eos": True}
        return SamplingParams(**given | seeded | self.sampling, detokenize=False)

    def together(self, given: Sequence[list[int]], first: int = 0) -> list[Answer]:
        """Answers to prompts that arrive at once, from a cache that is as it is."""
        tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt in given]
        asked = [self.asked(first + number) for number in range(len(given))]
        return [answer(output) for output in self.llm.generate(tokens, asked, use_tqdm=False)]

    def alone(self, given: Sequence[list[int]]) -> list[Answer]:
        """Answers to one prompt after the other, each from an empty cache."""
        answers = []
        for number, prompt in enumerate(given):
            assert self.llm.reset_prefix_cache()
            answers += self.together([prompt], number)
        return answers

    def staggered(self, given: Sequence[list[int]]) -> list[Answer]:
        """Answers to prompts of which one arrives at every second step."""
        engine, done, waiting, steps = self.llm.llm_engine, {}, list(enumerate(given)), 0
        while len(done) < len(given):
            if waiting and steps % 2 == 0:
                number, prompt = waiting.pop(0)
                tokens = TokensPrompt(prompt_token_ids=prompt)
                engine.add_request(str(number), tokens, self.asked(number))
            for output in engine.step():
                if output.finished:
                    done[int(output.request_id.split("-")[0])] = answer(output)
            steps += 1
        return [done[number] for number in range(len(given))]

    def counted(self, name: str) -> int:
        """One of vLLM's counters, as `vllm:num_preemptions`."""
        found = [m.value for m in self.llm.get_metrics() if m.name == name]
        assert found, f"vLLM counts no {name}"
        return int(sum(found))


def answer(output: Any) -> Answer:
    """Tokens and log-probabilities of a finished request."""
    (completion,) = output.outputs
    chosen = zip(completion.logprobs, completion.token_ids, strict=True)
    return tuple(completion.token_ids), tuple(ranked[token].logprob for ranked, token in chosen)


def same(found: Sequence[Answer], expected: Sequence[Answer]) -> int:
    """How many answers are equal, to the last bit of each log-probability."""
    return sum(a == b for a, b in zip(found, expected, strict=True))


def elsewhere(model: str, environment: dict[str, str], **engine: Any) -> list[Answer]:
    """What an engine answers to `prompts()` at once, in a process of its own.

    Args:
        model: A folder.
        environment: Variables beside this process's.
        **engine: Fields of `Engine`.
    """
    given = json.dumps({"model": model} | engine)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "answers.json")  # ranks write to the standard output, too
        command = [sys.executable, "-m", "tests.support.engines", given, str(found)]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        answers = json.loads(found.read_text())
    return [(tuple(tokens), tuple(numbers)) for tokens, numbers in answers]


if __name__ == "__main__":
    with Engine(**json.loads(sys.argv[1])) as asked_for:
        Path(sys.argv[2]).write_text(json.dumps(asked_for.together(prompts())))
