"""Log-probabilities in vLLM by `heal::log_softmax`: the bits of the model in transformers.

Imports vLLM. `Sampler.compute_logprobs` serves samples, prompts and drafts; vLLM offers no other
place for it. Installed once the first engine of a process asks for HEAL.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.sample.sampler import Sampler


def log_probabilities(logits: Tensor) -> Tensor:
    """FP32 `[T, V]` of logits, each row a function of itself alone.

    Args:
        logits: `[T, V]`.
    """
    return torch.ops.heal.log_softmax(logits.to(torch.float32), -1)


def install() -> None:
    """Let vLLM take its log-probabilities here."""
    if Sampler.compute_logprobs is not log_probabilities:
        Sampler.compute_logprobs = staticmethod(log_probabilities)
