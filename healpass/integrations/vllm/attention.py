"""Attention in vLLM over pages of integers: `heal::paged_write`, `heal::paged_attention`.

vLLM allocates the pages, `[blocks, Hkv, block_size, C]` bytes, and hands out slots; what a cell
holds is `ops.attention.paged`'s. Imports vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.errors import UnavailableError
from healpass.integrations.vllm.options import current
from healpass.ops.attention.paged import Cell

heal = torch.ops.heal
#: Tokens of a page are a multiple of it.
BLOCK = 16


@dataclass
class PagedBatch:
    """Where the requests of a step lie: what `heal::paged_attention` takes.

    Attributes:
        starts: `[R + 1]`, where each request's queries begin.
        lengths: `[R]`, its tokens.
        blocks: `[R, M]`, its pages.
        slots: INT64 `[T]`, where its new tokens are written; padding is negative.
        tokens: T.
        causal: Whether a query sees what comes before it only.
    """

    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    slots: Tensor
    tokens: int
    causal: bool


class HealMetadataBuilder(AttentionMetadataBuilder):
    """Keeps what vLLM's scheduler says; nothing is planned ahead."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,  # noqa: ARG002
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,  # noqa: ARG002
    ) -> PagedBatch:
        """The batch of one step.

        Args:
            common_prefix_len: How many tokens all requests begin with: nothing follows from it.
            common_attn_metadata: What the scheduler says.
            fast_build: Whether to plan less: nothing is planned.
        """
        step = common_attn_metadata
        requests = step.num_reqs
        return PagedBatch(
            starts=step.query_start_loc[: requests + 1],
            lengths=step.seq_lens[:requests],
            blocks=step.block_table_tensor[:requests],
            slots=step.slot_mapping,
            tokens=step.num_actual_tokens,
            causal=bool(step.causal),
        )


class HealAttention(AttentionImpl):
    """One layer's attention. The arguments are vLLM's.

    Raises:
        UnavailableError: ALiBi, attention that is not a decoder's, keys of another layer, or an
            engine that does not ask for HEAL.
    """

    #: Format of the pages that vLLM allocated.
    kv: ClassVar[str]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        options = current()
        if options is None or options.kv != self.kv:
            raise UnavailableError(
                f"vLLM keeps the attention backend of the first engine of a process, and that one "
                f"had pages of {self.kv}.\nStart each engine in its own process."
            )
        for name, given in {
            "ALiBi": alibi_slopes is not None,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "keys shared between layers": kv_sharing_target_layer_name is not None,
        }.items():
            if given:
                raise UnavailableError(
                    f"HEAL has no {name} in vLLM.\nRun the model in transformers with heal_model."
                )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale = head_size, float(scale)
        self.window, self.softcap, self.sinks = sliding_window, logits_soft_cap or None, sinks
        self.kv_cache_dtype, self.options = kv_cache_dtype, options

    def forward(
        self,
        layer: Any,  # noqa: ARG002
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedBatch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write a step's keys and values into the pages, and attend over them.

        Args:
            layer: vLLM's, not read.
            query: FP32 `[T, H, E]`.
            key: FP32 `[T, Hkv, E]`.
            value: FP32 `[T, Hkv, Ev]`.
            kv_cache: The pages.
            attn_metadata: The batch; None while vLLM measures memory.
            output: FP32, written.
            output_scale: None.
            output_block_scale: None.
        """
        assert (output_scale, output_block_scale) == (None, None), "no quantized output was asked"
        batch = attn_metadata
        if batch is None:
            return output.zero_()
        count, kv = len(batch.slots), self.options.kv
        heal.paged_write(kv_cache, key[:count], value[:count], batch.slots, kv)
        attended = heal.paged_attention(
            query[: batch.tokens], kv_cache, batch.starts, batch.lengths, batch.blocks, self.sinks,
            batch.causal, self.scale, self.window, self.softcap, value.shape[-1],
            kv, self.options.numerics,
        )  # fmt: skip
        output[: batch.tokens] = attended.reshape(output[: batch.tokens].shape)
        return output


class Int16Attention(HealAttention):
    """Over INT16 pages."""

    kv = "int16"


class Int24Attention(HealAttention):
    """Over INT24 pages."""

    kv = "int24"


class Int16Backend(AttentionBackend):
    """Pages of INT16 for decoders: any head size, windows, caps, sinks."""

    supported_dtypes = [torch.float32]
    supported_kv_cache_dtypes = ["auto"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """A name that vLLM's list of backends has."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HealAttention]:
        """Of one layer."""
        return Int16Attention

    @staticmethod
    def get_builder_cls() -> type[HealMetadataBuilder]:
        """Of one step's batch."""
        return HealMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The bytes of a cell, as `Cell` packs them; vLLM counts memory by it."""
        if spec.state_content_bytes is not None:
            return spec
        cell = Cell(cls.get_impl_cls().kv, spec.head_size, spec.head_size_v)
        return replace(spec, dtype=torch.int8, state_content_bytes=cell.nbytes)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """`[layers, blocks, heads, tokens, bytes]`."""
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:  # noqa: ARG004
        """Any multiple of `BLOCK` tokens."""
        return [MultipleOf(BLOCK)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Yes."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Yes."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No: a store outside does not know the format of a cell."""
        return False


class Int24Backend(Int16Backend):
    """The same over INT24."""

    @staticmethod
    def get_impl_cls() -> type[HealAttention]:
        """Of one layer."""
        return Int24Attention


#: `EngineOptions.kv` -> the backend of its pages.
BACKENDS = {"int16": Int16Backend, "int24": Int24Backend}
