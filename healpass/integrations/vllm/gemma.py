"""Gemma in vLLM: the factor of embeddings, rounded as transformers rounds it. Imports vLLM.

A Gemma of BF16 multiplies its embeddings by the square root of its width, rounded to BF16; so it
was trained. vLLM rounds the factor to the engine's dtype, which is FP32 here.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import gemma, gemma2, gemma3

from healpass.integrations.vllm.options import current
from healpass.integrations.vllm.stored import stored_dtype


class RoundedFactor:
    """A model whose factor has the checkpoint's dtype where the engine asks for HEAL."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if current() is not None:
            model = self.model  # type: ignore[attr-defined]
            exact = model.normalizer
            model.normalizer = exact.to(stored_dtype(exact.dtype)).to(exact.dtype)


class GemmaForCausalLM(RoundedFactor, gemma.GemmaForCausalLM):
    """Gemma."""


class Gemma2ForCausalLM(RoundedFactor, gemma2.Gemma2ForCausalLM):
    """Gemma 2."""


class Gemma3ForCausalLM(RoundedFactor, gemma3.Gemma3ForCausalLM):
    """Gemma 3."""
