"""The dtype of a checkpoint's weights, which stay as they are. Imports vLLM."""

from __future__ import annotations

import torch
from vllm.config import get_current_vllm_config


def stored_dtype(default: torch.dtype) -> torch.dtype:
    """The 16-bit dtype of the checkpoint; `default` where it has another.

    Args:
        default: The engine's.
    """
    model = get_current_vllm_config().model_config
    for config in (model.hf_text_config, model.hf_config):
        found = getattr(config, "dtype", None)
        found = getattr(torch, found) if isinstance(found, str) else found
        if found in (torch.bfloat16, torch.float16):
            return found
    return default
