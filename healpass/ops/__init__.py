"""The `heal::` operators: schema, meaning, fake, autograd. Imports `tensorcore` and below.

Importing this package registers them; they then work in eager code too, as
`torch.ops.heal.linear`.

Primitive operators carry their own autograd formula and are what a lowering replaces: `mm`, `bmm`,
`grouped_mm`, `attention`. So are the integer ones, which carry no gradient: `quantize`,
`dequantize`, `integer_attention` and its two gradients. Composite operators are written in terms
of those and of plain torch, so autograd, fake tensors and tracing see through them: `linear`,
`matmul`, `sdpa`.
"""

from healpass.ops import (
    attention,
    binary,
    elementary,
    exact_attention,
    exact_sdpa,
    flex,
    integer_attention,
    integer_gradients,
    matmul,
    normalize,
    quantize,
    reduce,
    sdpa,
    sharded,
    softmax,
    tensor_parallel,
    ties,
    weighted_sum,
)

__all__ = [
    "attention",
    "binary",
    "elementary",
    "exact_attention",
    "exact_sdpa",
    "flex",
    "integer_attention",
    "integer_gradients",
    "matmul",
    "normalize",
    "quantize",
    "reduce",
    "sdpa",
    "sharded",
    "softmax",
    "tensor_parallel",
    "ties",
    "weighted_sum",
]
