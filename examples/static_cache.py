"""Greedy text with a static INT16 cache, made once and used again.

    python examples/static_cache.py [--new-tokens 16] [--layers 2]

`heal_model` gives `generate` a growing HealCache. A static one has a fixed length, so that every
step has the same shapes: two graphs are compiled in all, one for prompts and one for a single
token. It takes the bytes of a BF16 cache plus one FP32 scale per token and head. `reset()` makes
room for the next prompt of the same batch size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

PROMPTS = ("Name three rivers.", "Why is the sky blue?")


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the prompts one after the other through one cache."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="of SmolLM2 (30 are all)")
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args(argv)

    from healpass.integrations import smollm2
    from healpass.integrations.transformers import HealCache, heal_model

    model, tokenizer = smollm2.load(torch.bfloat16, layers=options.layers)
    heal_model(model)
    cache = HealCache(model.config, max_cache_len=64)
    for prompt in PROMPTS:
        cache.reset()
        batch = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(
            **batch, past_key_values=cache, do_sample=False, max_new_tokens=options.new_tokens
        )
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(f"{cache.kv} cache of {cache.room} tokens: {cache.nbytes} bytes")


if __name__ == "__main__":
    main()
