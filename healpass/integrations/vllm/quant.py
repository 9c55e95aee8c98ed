"""Linear layers, embeddings and heads in vLLM: `quantization="heal"`. Imports vLLM.

Weights stay in the dtype of the checkpoint, activations are FP32, products are `heal::linear`.
Merged layers (QKV, gate and up) need nothing: the scales of `exact` belong to rows and columns.
A layer whose inputs are split over ranks adds integers across them (`heal::row_linear`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.v1.attention.selector import _cached_get_attn_backend

import healpass.ops  # noqa: F401  the operators must be registered
from healpass import lowering
from healpass.errors import UnavailableError
from healpass.integrations.vllm import sampling
from healpass.integrations.vllm.attention import BACKENDS
from healpass.integrations.vllm.compiled import multiplier
from healpass.integrations.vllm.experts import HealExpertsMethod
from healpass.integrations.vllm.options import NO_COMPILER, asked, check
from healpass.integrations.vllm.stored import stored_dtype

heal = torch.ops.heal


def registered() -> bool:
    """Whether vLLM knows `quantization="heal"` in this process."""
    return "heal" in QUANTIZATION_METHODS


class StoredWeights:
    """What both methods do with a weight: it stays in the checkpoint's dtype, as it was loaded."""

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """Allocate the weight.

        Args:
            layer: Gets the weight.
            *sizes: Four, as vLLM gives them; a fifth is `params_dtype`.
            **more: `params_dtype`, the engine's, before which the checkpoint's 16 bits go, and
                attributes of the weight.
        """
        given = sizes[4] if len(sizes) > 4 else more.pop("params_dtype")
        allocate = super().create_weights  # type: ignore[misc]
        allocate(layer, *sizes[:4], params_dtype=stored_dtype(given), **more)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weight as it is."""


class HealLinearMethod(StoredWeights, UnquantizedLinearMethod):
    """`heal::linear` of FP32 activations by weights as the checkpoint has them.

    Attributes:
        numerics: As the operator takes it.
    """

    def __init__(self, numerics: str) -> None:
        self.numerics = numerics

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """Allocate the weight; take the sum over ranks from the layer.

        Args:
            layer: Gets the weight.
            *sizes: As vLLM gives them.
            **more: As vLLM gives them.
        """
        super().create_weights(layer, *sizes, **more)
        layer.heal_group = None
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            if not layer.reduce_results:
                raise UnavailableError(
                    f"layer {layer.prefix} leaves the sum over ranks to the model, which adds "
                    "floats in the order of ranks.\nUse tensor_parallel_size=1."
                )
            layer.reduce_results = False
            layer.heal_group = get_tp_group().device_group.group_name

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product, FP32 `[T, N]`.

        Args:
            layer: Has the weight, `[N, K]`.
            x: FP32 `[T, K]`.
            bias: `[N]`, or None.
        """
        if layer.heal_group is None:
            return heal.linear(x, layer.weight, bias, self.numerics)
        own = None if layer.skip_bias_add else layer.bias
        return heal.row_linear(x, layer.weight, own, layer.heal_group, self.numerics)


class HealEmbeddingMethod(StoredWeights, UnquantizedEmbeddingMethod):
    """An embedding, or a head, of weights as the checkpoint has them.

    Attributes:
        multiply: `heal::linear` of activation, weight and bias.
    """

    def __init__(self, multiply: Callable[..., Tensor]) -> None:
        self.multiply = multiply

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits, FP32 `[T, V]`.

        Args:
            layer: Has the weight, `[V, K]`.
            x: FP32 `[T, K]`.
            bias: `[V]`, or None.
        """
        return self.multiply(x, layer.weight, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Rows of the weight, in FP32."""
        return torch.nn.functional.embedding(input_, layer.weight).to(torch.float32)


class HealQuantConfig(QuantizationConfig):
    """The switch: `quantization="heal"`. Its options are `additional_config["heal"]`."""

    prepared = False

    def _prepare(self, engine: Any) -> None:
        """Before the first layer: refuse, and drop what vLLM keeps of engines before this one."""
        if self.prepared:
            return
        check(engine, os.environ)
        if not _compiles(engine):  # a compiled graph brings the kernels along
            _start_kernels(engine.device_config.device_type)
        sampling.install()
        _ROPE_DICT.clear()
        _cached_get_attn_backend.cache_clear()
        self.prepared = True

    def get_name(self) -> str:
        """`heal`."""
        return "heal"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """FP32."""
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """8.0; a CPU is not asked."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: nothing of it stands in a checkpoint."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HealQuantConfig:  # noqa: ARG003
        """The switch; a checkpoint has nothing to say."""
        return cls()

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """How a layer multiplies.

        Raises:
            UnavailableError: The engine, or this layer, is not covered.
            ConfigError: A wrong option.
        """
        engine = get_current_vllm_config()
        options = asked(engine)
        if options is None:
            raise UnavailableError(
                "HealQuantConfig was given to an engine without quantization='heal'.\n"
                "Use healpass.integrations.vllm.engine_args."
            )
        self._prepare(engine)
        if isinstance(layer, VocabParallelEmbedding):
            return HealEmbeddingMethod(multiplier(options, _compiles(engine)))
        if isinstance(layer, LinearBase):
            return HealLinearMethod(options.numerics)
        if isinstance(layer, RoutedExperts):
            dtype = stored_dtype(torch.get_default_dtype())
            return HealExpertsMethod(layer, dtype, options.numerics)
        if type(layer).__name__ == "Attention":
            return _check_attention(layer)
        raise UnavailableError(
            f"layer {prefix} is a {type(layer).__name__}, whose products HEAL does not have in "
            "vLLM yet.\nRun the model in transformers with heal_model."
        )


def _compiles(engine: Any) -> bool:
    return int(engine.compilation_config.mode or 0) != NO_COMPILER


def _start_kernels(device: str) -> None:
    reason = lowering.start_kernels(device)
    if reason is not None:
        warnings.warn(
            "attention over pages is the reference implementation in this engine, which gathers "
            f"them: right, and slow. No kernel can be compiled here: {reason}\n"
            "Install a C++ compiler, or name one in the environment variable CXX.",
            stacklevel=2,
        )


def _check_attention(layer: Any) -> None:
    if layer.attn_backend not in BACKENDS.values():
        raise UnavailableError(
            f"vLLM chose {layer.attn_backend.__name__} for layer {layer.layer_name}, which is not "
            "over HEAL's pages.\nUse healpass.integrations.vllm.engine_args."
        )
