"""Lowerings to Triton templates, their tiles and their self-checks. Knows nothing of `cpu`."""

from healpass.lowering.cuda import (
    attention,
    attention_gradients,
    exact_attention,
    exact_matmul,
    matmul,
    paged,
)

__all__ = [
    "attention",
    "attention_gradients",
    "exact_attention",
    "exact_matmul",
    "matmul",
    "paged",
]
