"""Tiny checkpoints on disk for the study: a Llama of two layers, and what cannot be studied."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models

PADDING, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable character."""
    vocabulary = {PADDING: 0, END: 1, UNKNOWN: 2}
    for character in string.printable:
        vocabulary[character] = len(vocabulary)
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=PADDING, eos_token=END, unk_token=UNKNOWN
    )


def make_checkpoint(folder: Path, *, context: int = 2048, tokenizer: bool = True) -> Path:
    """A random Llama, BF16, in a folder as transformers saves it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        # The usual 0.02 gives logits without a clear winner.
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def _vocabulary(size: int) -> dict[str, Any]:
    """Entries of a byte-level tokenizer in a GGUF file, by the name of the method that adds it."""
    # Such a vocabulary spells a space and a line's end with letters of their own.
    tokens = [PADDING, END, UNKNOWN, "\u0120", "\u010a", *map(chr, range(33, 127)), "ab"]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    return {
        "tokenizer_model": "gpt2",
        "token_list": tokens,
        "token_types": [3] * 3 + [1] * (len(tokens) - 3),
        "token_merges": ["a b"],
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def make_gguf(path: Path, checkpoint: Path, kind: str = "F32", **tokenizer: Any) -> Path:
    """The checkpoint as llama.cpp keeps it: one file, Q and K in another order of rows.

    Args:
        path: Of the new file.
        checkpoint: What `make_checkpoint` made.
        kind: GGML type of the matrices that its blocks fit; the others are FP32.
        **tokenizer: Entries in place of those of `_vocabulary`; None leaves one out.
    """
    import gguf

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    for name, value in (_vocabulary(c.vocab_size) | tokenizer).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, weight in model.state_dict().items():
        count = heads.get(name.split(".")[-2])
        if count:  # pairs that turn together lie side by side
            weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(weight.shape)
        values = weight.numpy()
        chosen = gguf.GGMLQuantizationType[kind]
        if weight.dim() != 2 or weight.shape[1] % gguf.GGML_QUANT_SIZES[chosen][0]:
            chosen = gguf.GGMLQuantizationType.F32
        data = _packed(values, chosen)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _packed(values: Any, kind: Any) -> Any:
    """FP32 values in the blocks of a GGML type; zeros where only llama.cpp packs that type."""
    import gguf
    import numpy as np

    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        return np.zeros(gguf.quant_shape_to_byte_shape(values.shape, kind), dtype=np.uint8)


def make_encoder(folder: Path) -> Path:
    """A random BERT, which reads both ways."""
    config = transformers.BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.BertForMaskedLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_tasks(path: Path, questions: list[str]) -> Path:
    """A file of tasks that nobody answers right."""
    import json

    lines = [
        json.dumps(
            {"id": f"q{i}", "kind": "number", "question": q, "answer": "1", "tolerance": "0"}
        )
        for i, q in enumerate(questions)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
