"""The bits of `precision="exact"`: they change only with the numerics version.

The model is made of integers, so that no random number generator and no `pow` comes in. A digest
that differs means that results of users change: raise `NUMERICS_VERSION`, say in the change log
what became better, and write the digests anew by
`EXPECTTEST_ACCEPT=1 python -m pytest tests/golden/test_exact_digests.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

import healpass
from healpass.fingerprint import digest
from healpass.integrations import smollm2
from healpass.numerics_version import NUMERICS_VERSION
from healpass.ops.reproducible import fp64
from tests.support.rewriting import Rewritten

PATH = Path(__file__).with_name("exact_digests.json")
CASES = {
    "int16, 5 products": {},
    "int16, 3 products": {"exact_products": 3},
    "int24, 8 products": {"exact_products": 8, "kv": "int24"},
}
OPTIONS = {"precision": "exact", "outputs": "fp32"}
TOKENS = torch.tensor([[3, 1, 4, 15, 9, 2, 6, 53, 58, 9, 7, 93]])


def scattered(count: int, seed: int) -> torch.Tensor:
    """`count` BF16 numbers up to 1/4 without a pattern: 8 bits, 16 binades."""
    x = (torch.arange(count) + seed * 7919) * 2654435761 & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 2246822519 & 0xFFFFFFFF
    return torch.ldexp((((x >> 13) & 0xFF) - 128).float(), -9 - ((x >> 22) & 15))


def model_of_integers() -> torch.nn.Module:
    """A small Llama whose weights are made by integer arithmetic, those of its norms near 1."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for seed, (name, weight) in enumerate(sorted(model.named_parameters())):
            values = 4 * scattered(weight.numel(), seed).reshape(weight.shape)
            weight.copy_(values + 1 if "norm" in name else values)
        for _, buffer in model.named_buffers():  # the frequencies of the rotary embedding
            buffer.copy_(torch.ldexp(torch.ones(buffer.numel()), -torch.arange(buffer.numel())))
    return model


def logits(model: torch.nn.Module, tokens: torch.Tensor, **options) -> torch.Tensor:
    call = Rewritten(model, healpass.HealConfig(**(OPTIONS | options)))
    with torch.no_grad():
        return call(input_ids=tokens, use_cache=False).logits


def gradients() -> torch.Tensor:
    """All gradients of a training step of the model, in one row."""
    model = model_of_integers().float()

    def loss(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    Rewritten(loss, healpass.HealConfig(**OPTIONS), aot=True)(TOKENS).backward()
    return torch.cat([w.grad.reshape(-1) for _, w in sorted(model.named_parameters())])


def expect(name: str, found: str) -> None:
    """Compare with the file, or write it where that was asked for."""
    saved = json.loads(PATH.read_text()) if PATH.exists() else {}
    if os.environ.get("EXPECTTEST_ACCEPT"):
        digests = saved.get("digests", {}) | {name: found}
        saved = {"numerics_version": NUMERICS_VERSION, "digests": dict(sorted(digests.items()))}
        PATH.write_text(json.dumps(saved, indent=2) + "\n")
    assert saved["numerics_version"] == NUMERICS_VERSION, "write the digests of this version anew"
    assert saved["digests"][name] == found, (
        f"{name}: the bits of precision='exact' have changed without a new numerics version; read "
        "the module's head"
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_have_their_bits(name):
    expect(name, digest(logits(model_of_integers(), TOKENS, **CASES[name])))


def test_gradients_have_their_bits():
    expect("gradients", digest(gradients()))


def test_another_last_bit_is_another_digest(monkeypatch):
    """The inverse: one constant of the exponential, moved by its last bit."""
    model = model_of_integers()
    first = digest(logits(model, TOKENS))
    moved = float(torch.nextafter(torch.tensor(fp64.LN2_HIGH), torch.tensor(1.0)))
    monkeypatch.setattr(fp64, "LN2_HIGH", moved)
    torch._dynamo.reset()
    assert digest(logits(model, TOKENS)) != first


@pytest.mark.model
@pytest.mark.deep
def test_smollm2_has_its_bits():
    """All thirty layers on one sentence."""
    model, tokenizer = smollm2.load(torch.bfloat16)
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    expect("smollm2-135m", digest(logits(model, tokens)))
