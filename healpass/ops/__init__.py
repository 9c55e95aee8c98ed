"""The `heal::` operators: schema, meaning, fake, autograd. Imports `tensorcore` and below.

Importing this package registers them; they then work in eager code too, as
`torch.ops.heal.linear`.

Primitive operators carry their own autograd formula and are what a lowering replaces: `mm`, `bmm`,
`grouped_mm`, `attention`. So are the integer ones, which carry no gradient: `quantize`,
`dequantize`, `integer_attention`. The gradients of both attentions are operators, too. Composite
operators are written in terms of those and of plain torch, so autograd, fake tensors and tracing
see through them: `linear`, `matmul`, `sdpa`.
"""

from healpass.ops import (
    attention,
    binary,
    digit_products,
    elementary,
    exact_attention,
    exact_attention_parts,
    exact_sdpa,
    exact_special,
    flex,
    integer_attention,
    lookup,
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
    "digit_products",
    "elementary",
    "exact_attention",
    "exact_attention_parts",
    "exact_sdpa",
    "exact_special",
    "flex",
    "integer_attention",
    "lookup",
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
