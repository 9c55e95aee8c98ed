"""Lowerings to C++ code. Knows nothing of `cuda`."""

import torch._inductor.lowering  # noqa: F401  first: it and Inductor's templates import each other

from healpass.lowering.cpu import attention, attention_gradients, exact, loops, paged, products

__all__ = ["attention", "attention_gradients", "exact", "loops", "paged", "products"]
