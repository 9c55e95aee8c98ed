"""A tiny random Llama for tests of the integrations."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def make_llama(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """The same random model whenever it is called; `changes` go to its configuration."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES | {"eos_token_id": None, "pad_token_id": 0} | changes
    )
    # The usual 0.02 gives logits without a clear winner, and greedy text that ends in ties.
    config.initializer_range = 0.2
    return transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()
