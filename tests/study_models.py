"""Tiny checkpoints on disk for the study: a Llama of two layers, and what cannot be studied."""

from __future__ import annotations

import string
from pathlib import Path

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
