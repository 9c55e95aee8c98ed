"""Layers of vLLM between its products: norms, activations, rotary tables, the logits' cap.

Each stands in for vLLM's class of the same name, in every engine of a process, and does something
else only in one that asks for `precision="exact"`: there elementary functions are `heal::`
operators, which have one value on every device. Imports vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul, SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import (
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.errors import UnavailableError
from healpass.integrations.frequencies import PinnedFunctions
from healpass.integrations.vllm.options import current

heal = torch.ops.heal


class Exact:
    """What the layers below have in common: `exact`, as the engine asks when one is built."""

    exact: bool

    def __init__(self, *arguments: Any, **more: Any) -> None:
        options = current()
        object.__setattr__(self, "exact", options is not None and options.is_exact)
        super().__init__(*arguments, **more)

    def dispatch_forward(self, *arguments: Any, **more: Any) -> Any:
        """`forward_native` where `exact`, or what vLLM would take."""
        if self.exact:
            return self.forward_native  # type: ignore[attr-defined]
        return super().dispatch_forward(*arguments, **more)  # type: ignore[misc]


def normalized(x: Tensor, epsilon: float) -> Tensor:
    """`x` over its root mean square, FP32 `[..., N]`.

    Args:
        x: FP32 `[..., N]`.
        epsilon: Added to the mean of squares.
    """
    variance = heal.mean(heal.pow_scalar(x, 2.0), [-1], True)
    return x * heal.rsqrt(variance + epsilon)


class HealRMSNorm(Exact, RMSNorm):
    """`x / rms(x) * weight`, and the same of a sum with a residual.

    Raises:
        UnavailableError: `exact`, and a norm over a part of the row.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.exact and self.variance_size_override is not None:
            raise UnavailableError(
                "precision='exact' has no norm over a part of a row in vLLM.\n"
                "Use precision='heal', or heal_model in transformers."
            )

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The norm; with a residual also the sum."""
        if not self.exact:
            return super().forward_native(x, residual)
        x = x if residual is None else x + residual
        scaled = normalized(x, self.variance_epsilon)
        scaled = scaled * self.weight if self.has_weight else scaled
        return scaled if residual is None else (scaled, x)


class HealGemmaRMSNorm(Exact, GemmaRMSNorm):
    """`x / rms(x) * (1 + weight)`."""

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The norm; with a residual also the sum."""
        if not self.exact:
            return super().forward_native(x, residual)
        x = x if residual is None else x + residual
        scaled = normalized(x, self.variance_epsilon) * (self.weight + 1.0)
        return scaled if residual is None else (scaled, x)


class HealSiluAndMul(Exact, SiluAndMul):
    """`silu(gate) * up` of `[gate | up]`."""

    def forward_native(self, x: Tensor) -> Tensor:
        """`[..., N]` of `[..., 2 N]`."""
        if not self.exact:
            return super().forward_native(x)
        gate, up = x.chunk(2, -1)
        return heal.silu(gate) * up


class HealGeluAndMul(Exact, GeluAndMul):
    """`gelu(gate) * up` of `[gate | up]`."""

    def forward_native(self, x: Tensor) -> Tensor:
        """`[..., N]` of `[..., 2 N]`."""
        if not self.exact:
            return super().forward_native(x)
        gate, up = x.chunk(2, -1)
        return (heal.gelu_tanh if self.approximate == "tanh" else heal.gelu)(gate) * up


class HealSwigluOAIAndMul(Exact, SwigluOAIAndMul):
    """GPT-OSS's gate, of `[gate, up, gate, up, ...]`."""

    def forward_native(self, x: Tensor) -> Tensor:
        """`[..., N]` of `[..., 2 N]`."""
        if not self.exact:
            return super().forward_native(x)
        gate = x[..., ::2].clamp(max=self.limit)
        up = x[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * (gate * heal.sigmoid(gate * self.alpha))


class Quantized:
    """A layer with the engine's quantization, which some models do not hand on to it."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        if current() is not None and not more.get("quant_method"):
            more["quant_config"] = (
                more.get("quant_config") or get_current_vllm_config().quant_config
            )
        super().__init__(*arguments, **more)


class HealVocabParallelEmbedding(Quantized, VocabParallelEmbedding):
    """Gemma's and Cohere's are their heads, too."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if current() is not None:  # the fused kernel hands out the checkpoint's dtype
            self.use_fused_embedding = False


class HealParallelLMHead(Quantized, ParallelLMHead):
    """A head."""


class HealReplicatedLinear(Quantized, ReplicatedLinear):
    """The gate of a shared expert."""


class HealGateLinear(Quantized, GateLinear):
    """A router's product: `heal::linear`, and neither the kernels nor the cast beside it."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.heal = current() is not None

    def forward(self, x: Tensor) -> Any:
        """Scores `[T, experts]`; with None for the bias where the model takes two."""
        return ReplicatedLinear.forward(self, x) if self.heal else super().forward(x)


class HealLogitsProcessor(LogitsProcessor):
    """Logits, capped by a pinned tanh where `exact`.

    Raises:
        UnavailableError: `exact`, and a head that is not HEAL's, when it is first called.
    """

    soft_cap: float | None

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        options = current()
        self.exact, self.exact_cap = options is not None and options.is_exact, None
        if self.exact:
            self.exact_cap, self.soft_cap = self.soft_cap, None

    def _apply_head(self, lm_head: Any, hidden_states: Tensor, embedding_bias: Any) -> Tensor:
        method = getattr(lm_head, "quant_method", None)
        if self.exact and (type(method).__name__, self.head_dtype) not in HEADS:
            raise UnavailableError(
                f"precision='exact' was asked for, and this model's head multiplies by "
                f"{type(method).__name__} in {self.head_dtype}.\n"
                "Leave head_dtype out, or run the model in transformers with heal_model."
            )
        return super()._apply_head(lm_head, hidden_states, embedding_bias)

    def _get_logits(self, *arguments: Any, **more: Any) -> Tensor | None:
        logits = super()._get_logits(*arguments, **more)
        if logits is None or self.exact_cap is None:
            return logits
        return heal.tanh(logits / self.exact_cap) * self.exact_cap


#: Method and dtype of a head that is HEAL's.
HEADS = [("HealEmbeddingMethod", dtype) for dtype in (None, torch.float32)]


class PinnedTables(Exact):
    """A rotary embedding whose frequencies and table pinned functions make, on CPU."""

    def _compute_cos_sin_cache(self) -> Tensor:
        if not self.exact:
            return super()._compute_cos_sin_cache()  # type: ignore[misc]
        target = torch.get_default_device()
        with torch.device("cpu"), PinnedFunctions():
            table = self.table()
        return table.to(target)

    def table(self) -> Tensor:
        """Cosines and sines, FP32 `[positions, rotary_dim]`."""
        return super()._compute_cos_sin_cache()  # type: ignore[misc]


class HealRotaryEmbedding(PinnedTables, RotaryEmbedding):
    """Without scaling."""


class HealLinearRotaryEmbedding(PinnedTables, LinearScalingRotaryEmbedding):
    """Frequencies over a factor; vLLM divides positions instead, which rounds otherwise."""

    def table(self) -> Tensor:
        """Cosines and sines, FP32 `[positions, rotary_dim]`."""
        (factor,) = self.scaling_factors
        self._scaling_factor_to_offset = {float(factor): 0}
        positions = torch.arange(self.max_position_embeddings * factor, dtype=torch.float32)
        angles = positions[:, None] * (self._compute_inv_freq(self.base) / factor)
        return torch.cat((angles.cos(), angles.sin()), -1)


class HealDynamicRotaryEmbedding(PinnedTables, DynamicNTKScalingRotaryEmbedding):
    """Frequencies of requests that are not longer than what the model was trained with."""


class HealLlama3RotaryEmbedding(PinnedTables, Llama3RotaryEmbedding):
    """Llama 3's frequencies."""


class HealYaRNRotaryEmbedding(PinnedTables, YaRNScalingRotaryEmbedding):
    """YaRN's frequencies and magnitude."""


#: vLLM's layer -> what stands in for it.
LAYERS: dict[Any, Any] = {
    RMSNorm: HealRMSNorm,
    GemmaRMSNorm: HealGemmaRMSNorm,
    SiluAndMul: HealSiluAndMul,
    GeluAndMul: HealGeluAndMul,
    SwigluOAIAndMul: HealSwigluOAIAndMul,
    GateLinear: HealGateLinear,
    ReplicatedLinear: HealReplicatedLinear,
    ParallelLMHead: HealParallelLMHead,
    VocabParallelEmbedding: HealVocabParallelEmbedding,
    LogitsProcessor: HealLogitsProcessor,
    RotaryEmbedding: HealRotaryEmbedding,
    LinearScalingRotaryEmbedding: HealLinearRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding: HealDynamicRotaryEmbedding,
    Llama3RotaryEmbedding: HealLlama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding: HealYaRNRotaryEmbedding,
}


def register() -> None:
    """Let vLLM build these in the place of its own."""
    for theirs, ours in LAYERS.items():
        name = theirs.name
        theirs.register_oot(ours)
        ours.name = name  # by which `custom_ops` switches it on and off
