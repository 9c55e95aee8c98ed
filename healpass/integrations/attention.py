"""`attn_implementation="heal"` for transformers. Layer `integrations`: imports `ops`, `config`.

transformers keeps attention functions and mask functions in two tables. A name that stands in the
first only gets no mask at all, and padding is then attended to in silence; `register` enters both.

In eager models the name decides the format: `heal` is INT16, `heal_int24` and `heal_fp32` the
others. In a model that HEAL compiles the options and the cache decide, and `heal` stands for
whatever they say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import create_position_bias_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.errors import ConfigError

#: Name of an attention implementation -> format of Q, K and V.
IMPLEMENTATIONS = {"heal": "int16", "heal_int24": "int24", "heal_fp32": "fp32"}


def register() -> None:
    """Give transformers the implementations of `IMPLEMENTATIONS`, attention and mask together."""
    for name in IMPLEMENTATIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention interface asks.

    Args:
        module: The attention layer; its configuration names the implementation.
        query: `[B, H, L, E]`.
        key: `[B, Hkv, S, E]`.
        value: `[B, Hkv, S, Ev]`.
        attention_mask: Bool or float `[B, 1 or H, L, S]`; windows and padding are in it.
        dropout: Probability of dropping a weight.
        scaling: Factor of the scores.
        is_causal: Whether the layer is causal; the module's own if None.
        softcap: Cap of the scores (Gemma 2).
        s_aux: Sinks `[H]` (gpt-oss).
        position_bias: Added to the scores (T5).

    Returns:
        `[B, L, H, Ev]` in the query's dtype, and no weights.

    Raises:
        ConfigError: The mask function is not registered, or the implementation is another.
    """
    kv = _format(module)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = query.shape[2] > 1 and attention_mask is None and causal
    if position_bias is not None:
        attention_mask = create_position_bias_mask(
            position_bias[..., : key.shape[2]], attention_mask, causal, query, key
        )
        causal = False
    attended = torch.ops.heal.sdpa(
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scale=scaling,
        enable_gqa=True,
        softcap=softcap,
        sinks=s_aux,
        kv=kv,
    )
    return attended.to(query.dtype).transpose(1, 2).contiguous(), None


def _format(module: nn.Module) -> str:
    name = getattr(getattr(module, "config", None), "_attn_implementation", "heal")
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ConfigError(
            f"attention {name!r} has no mask function in transformers, so padding and causality "
            "would be ignored. Call healpass.integrations.transformers.register(), which enters "
            "attention and mask together."
        )
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"attention {name!r} is none of healpass: {', '.join(IMPLEMENTATIONS)}. Register "
            "HEAL's attention under its own names, with register()."
        )
    return IMPLEMENTATIONS[name]
