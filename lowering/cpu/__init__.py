"""Lowerings to C++ code. Knows nothing of `cuda`."""

from healpass.lowering.cpu import attention, attention_gradients, exact, products

__all__ = ["attention", "attention_gradients", "exact", "products"]
