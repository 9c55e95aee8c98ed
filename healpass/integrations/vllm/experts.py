"""Mixtures of experts in vLLM: routing, and products by `heal::grouped_mm`. Imports vLLM.

What `heal_model` computes of the same layer: rows are sorted by expert, multiplied in groups,
weighted, and summed exactly, so that the bits do not depend on who came with whom. The router's
choice is part of it: equal scores go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul, SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.errors import UnavailableError

heal = torch.ops.heal
#: vLLM's name of an activation -> what makes it, of `[gate | up]`.
ACTIVATIONS: dict[str, Any] = {
    "silu": SiluAndMul,
    "gelu": GeluAndMul,
    "gelu_tanh": lambda: GeluAndMul(approximate="tanh"),
    "swigluoai": SwigluOAIAndMul,
}
#: GPT-OSS: the softmax is over the experts that were chosen, as its router has it.
CHOSEN_FIRST = "swigluoai"


class HealExpertsMethod(FusedMoEMethodBase):
    """Experts of weights as the checkpoint has them, chosen and multiplied by `heal::`.

    Args:
        layer: vLLM's `RoutedExperts`.
        dtype: Of the weights.
        numerics: As the operators take it.

    Raises:
        UnavailableError: The layer routes in another way, or its experts are split over ranks.
    """

    def __init__(self, layer: Any, dtype: torch.dtype, numerics: str) -> None:
        super().__init__(layer.moe_config)
        for reason in reasons(layer):
            raise UnavailableError(
                f"quantization='heal' cannot run the experts of {layer.layer_name}: {reason}\n"
                "Run the model in transformers with heal_model."
            )
        self.dtype, self.numerics = dtype, numerics
        self.activation = ACTIVATIONS[layer.activation.value]()

    @property
    def is_monolithic(self) -> bool:
        """Yes: the router's scores come here, not its choice."""
        return True

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:  # noqa: ARG002
        """Nothing is scaled."""
        return FusedMoEQuantConfig.make()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """Allocate `w13_weight` `[experts, 2 I, H]`, `w2_weight` `[experts, H, I]`, their biases.

        Args:
            layer: Gets the weights.
            num_experts: How many.
            hidden_size: H.
            intermediate_size_per_partition: I.
            params_dtype: The engine's; the checkpoint's goes before it.
            **more: Attributes of the weights.
        """
        del params_dtype
        inner = intermediate_size_per_partition
        shapes = {"w13": (2 * inner, hidden_size), "w2": (hidden_size, inner)}
        for name, (rows, columns) in shapes.items():
            sizes: dict[str, tuple[int, ...]] = {"weight": (num_experts, rows, columns)}
            if self.moe.has_bias:
                sizes["bias"] = (num_experts, rows)
            for kind, size in sizes.items():
                made = nn.Parameter(torch.zeros(size, dtype=self.dtype), requires_grad=False)
                layer.register_parameter(f"{name}_{kind}", made)
                set_weight_attrs(made, more)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weights as they are."""

    def apply_monolithic(
        self,
        layer: Any,
        x: Tensor,
        router_logits: Tensor,
        input_ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """The weighted sum of each token's experts, FP32 `[T, H]`.

        Args:
            layer: Has the weights.
            x: FP32 `[T, H]`.
            router_logits: FP32 `[T, experts]`.
            input_ids: Not read.
        """
        weights, chosen = route(
            router_logits, layer.top_k, layer.renormalize, layer.activation.value == CHOSEN_FIRST
        )
        experts, order = torch.sort(chosen.reshape(-1), stable=True)
        ends = experts[:, None] <= torch.arange(layer.global_num_experts, device=x.device)
        ends = ends.sum(0, dtype=torch.int32)
        inner = self._multiply(layer, "w13", x[order // layer.top_k], experts, ends)
        rows = self._multiply(layer, "w2", self.activation(inner), experts, ends)
        rows = rows * weights.reshape(-1)[order][:, None]
        return heal.sum(rows[order.argsort()].view(*chosen.shape, x.shape[-1]), [1], False)

    def _multiply(self, layer: Any, name: str, x: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        """`[S, N]` of rows `[S, K]` that lie in groups, each by its expert's weight and bias."""
        weight = getattr(layer, f"{name}_weight")
        rows = heal.grouped_mm(x, weight.transpose(1, 2), ends, self.numerics)
        return rows + getattr(layer, f"{name}_bias")[experts] if self.moe.has_bias else rows


def route(
    logits: Tensor, count: int, renormalize: bool, chosen_first: bool
) -> tuple[Tensor, Tensor]:
    """Which experts each token takes, and their weights, as transformers' routers have it.

    Args:
        logits: FP32 `[T, experts]`.
        count: How many experts a token takes.
        renormalize: Whether its weights add up to one.
        chosen_first: The softmax is over the chosen.

    Returns:
        FP32 and INT64 `[T, count]`.
    """
    if chosen_first:
        best, chosen = heal.stable_topk(logits, count)
        return heal.softmax(best, -1), chosen
    best, chosen = heal.stable_topk(heal.softmax(logits, -1), count)
    if renormalize:
        best = heal.div(best, heal.sum(best, [-1], True))
    return best, chosen


def reasons(layer: Any) -> Iterator[str]:
    """Why HEAL cannot run a layer.

    Args:
        layer: vLLM's `RoutedExperts`.
    """
    parallel = layer.moe_config.moe_parallel_config
    if max(parallel.tp_size, parallel.ep_size, parallel.dp_size) > 1 or parallel.enable_eplb:
        yield "split over ranks, sums of experts are sums of floats. Use one rank."
    for name, given in {
        f"scoring_func={layer.scoring_func!r}": layer.scoring_func != "softmax",
        "groups of experts": layer.use_grouped_topk,
        "a routing function of the model's": layer.custom_routing_function is not None,
        "a correction of scores": layer.e_score_correction_bias is not None,
        "weights of the router on inputs": layer.apply_router_weight_on_input,
        f"routed_scaling_factor={layer.routed_scaling_factor}": layer.routed_scaling_factor != 1.0,
        f"activation={layer.activation.value!r}": layer.activation.value not in ACTIVATIONS,
        "a limit of activations": (layer.swiglu_limit, layer.swiglu_alpha) != (None, None),
    }.items():
        if given:
            yield f"{name} is not among what HEAL has in vLLM."
