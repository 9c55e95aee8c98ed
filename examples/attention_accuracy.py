"""How far SmolLM2-135M's logits lie from FP64 with keys and values in each format, and its bytes.

    python examples/attention_accuracy.py [--tokens 2048]

The model reads its own license, teacher-forced, with weights that are BF16 numbers. In eager code
the arithmetic is FP32, so that the format of Q, K and V is all that differs between the rows:

* BF16 model: everything in BF16, for scale.
* BF16 cache: keys and values rounded to BF16, the best a caller's BF16 cache allows.
* INT16, INT24: Q, K and V as healpass quantizes them.
* FP32 model: plain torch.

The rows "compiled" are the BF16 model itself, through `torch.compile(backend="heal")`.

The second table fills one layer of each cache and counts the bytes of what it holds.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from healpass.integrations import smollm2
from healpass.integrations.transformers import HealCache, register

TEXT = Path(__file__).parents[1] / "LICENSE"


@dataclass(frozen=True)
class Run:
    """A row of the table: dtype of the model, attention implementation, `kv` if compiled."""

    dtype: torch.dtype
    attention: str = "sdpa"
    kv: str | None = None


EAGER = {
    "BF16 model": Run(torch.bfloat16),
    "BF16 cache": Run(torch.float32, "bf16_cache"),
    "INT16": Run(torch.float32, "heal"),
    "INT24": Run(torch.float32, "heal_int24"),
    "FP32 model": Run(torch.float32),
}
COMPILED = {
    f"{kv}, compiled": Run(torch.bfloat16, kv=kv.lower()) for kv in ("INT16", "INT24", "FP32")
}
#: Tokens whose logits exist at once: a vocabulary of logits in FP64 is large.
CHUNK = 128


def bf16_cache(module, query, key, value, *args, **kwargs):  # type: ignore[no-untyped-def]
    """FP32 attention on keys and values that went through a BF16 cache."""
    key, value = (states.bfloat16().to(query.dtype) for states in (key, value))
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def text(tokens: int) -> Tensor:
    """The first tokens of the license, `[1, tokens]`."""
    _, tokenizer = smollm2.load(torch.bfloat16)
    ids: Tensor = tokenizer(TEXT.read_text(), return_tensors="pt")["input_ids"]
    return ids[:, :tokens]


def logits(run: Run, ids: Tensor) -> Iterator[Tensor]:
    """The logits of all tokens in FP64, `CHUNK` tokens at a time."""
    model, _ = smollm2.load(run.dtype)
    model.set_attn_implementation(run.attention)
    body, head = model.model, model.lm_head
    if run.kv is not None:
        options = {"kv": run.kv, "outputs": "fp32"}
        body = torch.compile(body, backend="heal", options=options)
        head = partial(F.linear, weight=head.weight.float())
    hidden = body(ids, use_cache=False).last_hidden_state
    for part in hidden.split(CHUNK, 1):
        yield head(part).double()


def errors(ids: Tensor, runs: dict[str, Run]) -> dict[str, float]:
    """Per run `|logits - exact| / |exact|` in the Frobenius norm over all tokens."""
    register()
    ALL_ATTENTION_FUNCTIONS.register("bf16_cache", bf16_cache)
    ALL_MASK_ATTENTION_FUNCTIONS.register("bf16_cache", sdpa_mask)
    found = {name: logits(run, ids) for name, run in runs.items()}
    squares, size = dict.fromkeys(found, 0.0), 0.0
    with torch.no_grad():
        for exact in logits(Run(torch.float64), ids):
            size += float(exact.square().sum())
            for name, parts in found.items():
                squares[name] += float((next(parts) - exact).square().sum())
    return {name: (square / size) ** 0.5 for name, square in squares.items()}


def cache_bytes(cache: object, head_size: int, tokens: int = 256) -> int:
    """Bytes of the tensors that one layer of a cache holds for `tokens` tokens and two heads."""
    layer = cache.layers[0]  # type: ignore[attr-defined]
    layer.update(*(torch.randn(1, 2, tokens, head_size) for _ in range(2)))
    stores = getattr(layer, "stores", (layer,))
    held = [tensor for store in stores for tensor in (store.keys, store.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def bytes_ratios(head_size: int, tokens: int = 256) -> dict[str, float]:
    """Bytes of each HealCache over those of a BF16 cache of transformers."""
    config = transformers.LlamaConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=2 * head_size
    )
    theirs = StaticCache(config=config, max_cache_len=tokens)
    states = (torch.zeros(1, 2, 0, head_size, dtype=torch.bfloat16),) * 2
    theirs.layers[0].lazy_initialization(*states)
    baseline = sum(
        tensor.untyped_storage().nbytes()
        for tensor in (theirs.layers[0].keys, theirs.layers[0].values)
    )
    return {
        kv: cache_bytes(HealCache(config, tokens, kv), head_size, tokens) / baseline
        for kv in ("int16", "int24", "fp32")
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    ids = text(parser.parse_args().tokens)
    found = errors(ids, EAGER | COMPILED)
    table = Table("run", "relative logit error", "/ FP32 model", title=f"{ids.shape[1]} tokens")
    for name, error in found.items():
        table.add_row(name, f"{error:.2e}", f"{error / found['FP32 model']:.2f}")
    Console().print(table)
    table = Table("cache", "head size 64", "head size 128", title="bytes / BF16 cache")
    for kv, ratio in bytes_ratios(64).items():
        table.add_row(kv, f"{ratio:.4f}", f"{bytes_ratios(128)[kv]:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
