"""Tiny random models of the families that the rewrite must cover, and inputs for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY = 96


@dataclass(frozen=True)
class Family:
    """A model family: `make(dtype)` builds a random model, `inputs()` what to call it with."""

    name: str
    make: Callable[[torch.dtype], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Tensor]]

    def pair(self, seed: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """The same random model twice: with weights of `dtype` and, those weights, in FP64."""
        torch.manual_seed(seed)
        model = self.make(dtype)
        return model, self.twin(model, torch.float64)

    def twin(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The same model in another dtype: equal parameters and equal buffers, saved or not."""
        twin = self.make(dtype)
        twin.load_state_dict(model.state_dict())
        for (_, ours), (_, theirs) in zip(
            model.named_buffers(), twin.named_buffers(), strict=True
        ):
            theirs.copy_(ours)
        return twin


def text(dtype: torch.dtype) -> dict[str, Tensor]:
    """Two sentences of token ids, no token twice in a row."""
    generator = torch.Generator().manual_seed(7)
    return {"input_ids": torch.randint(1, VOCABULARY, (2, 9), generator=generator)}


def text_to_text(dtype: torch.dtype) -> dict[str, Tensor]:
    """An encoder's and a decoder's input."""
    ids = text(dtype)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


def image(dtype: torch.dtype) -> dict[str, Tensor]:
    """Two small images."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(2, 3, 16, 16, generator=generator).to(torch.bfloat16)
    return {"pixel_values": pixels.to(dtype)}


def states(dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states for nn.Transformer."""
    generator = torch.Generator().manual_seed(7)
    source = torch.randn(2, 7, 32, generator=generator).to(torch.bfloat16).to(dtype)
    return {"src": source, "tgt": source[:, :4]}


def _hf(model: type, config: Any) -> Callable[[torch.dtype], nn.Module]:
    def make(dtype: torch.dtype) -> nn.Module:
        built = model._from_config(copy.deepcopy(config), dtype=dtype)
        if dtype == torch.float64 and hasattr(built, "set_experts_implementation"):
            built.set_experts_implementation("eager")  # torch's grouped_mm has no FP64
        return built.eval()

    return make


class _Transformer(nn.Transformer):
    def forward(self, src: Tensor, tgt: Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=super().forward(src, tgt))


def _transformer(dtype: torch.dtype) -> nn.Module:
    return _Transformer(32, 2, 1, 1, 48, dropout=0.0, batch_first=True, dtype=dtype)


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BERT_SIZES = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"} | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

FAMILIES = (
    Family("llama", _hf(hf.LlamaForCausalLM, hf.LlamaConfig(**_SIZES)), text),
    Family("qwen2", _hf(hf.Qwen2ForCausalLM, hf.Qwen2Config(**_SIZES)), text),
    Family("qwen3", _hf(hf.Qwen3ForCausalLM, hf.Qwen3Config(**_SIZES, head_dim=8)), text),
    Family(
        "mistral", _hf(hf.MistralForCausalLM, hf.MistralConfig(**_SIZES, sliding_window=4)), text
    ),
    Family(
        "gemma2",
        _hf(hf.Gemma2ForCausalLM, hf.Gemma2Config(**_SIZES, head_dim=8, sliding_window=4)),
        text,
    ),
    Family(
        "mixtral",
        _hf(
            hf.MixtralForCausalLM,
            hf.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
        ),
        text,
    ),
    Family(
        "gpt2",
        _hf(
            hf.GPT2LMHeadModel,
            hf.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=32,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        text,
    ),
    Family(
        "opt",
        _hf(
            hf.OPTForCausalLM,
            hf.OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                dropout=0.0,
                num_attention_heads=4,
                max_position_embeddings=32,
                word_embed_proj_dim=32,
            ),
        ),
        text,
    ),
    Family("bert", _hf(hf.BertForMaskedLM, hf.BertConfig(**_BERT_SIZES)), text),
    Family(
        "t5",
        _hf(
            hf.T5ForConditionalGeneration,
            hf.T5Config(
                vocab_size=VOCABULARY,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=1,
                num_heads=4,
                decoder_start_token_id=0,
                dropout_rate=0.0,
            ),
        ),
        text_to_text,
    ),
    Family("transformer", _transformer, states),
    Family(
        "vit",
        _hf(
            hf.ViTForImageClassification,
            hf.ViTConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=4,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
        ),
        image,
    ),
)
#: Families in which not one matmul may be kept.
DECODER_ONLY = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral", "gpt2", "opt")
