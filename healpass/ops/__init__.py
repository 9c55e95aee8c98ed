"""The `heal::` operators: schema, reference, fake, autograd. Imports `tensorcore` and below.

`reproducible` <- `products` <- `attention`: a wing imports only what lies to its left, and
`library`. Importing this package registers them; they then work in eager code too, as
`torch.ops.heal.linear`.

Primitive operators carry their own autograd formula and are what a lowering replaces: `mm`, `bmm`,
`grouped_mm`, `attention`. So are the integer ones, which carry no gradient: `quantize`,
`dequantize`, `integer_attention`. The gradients of both attentions are operators, too. `numerics`
decides in all of them: `heal`, `layercast`, or `exact` with its number of products. Composite
operators are written in terms of those and of plain torch, so autograd, fake tensors and tracing
see through them: `linear`, `matmul`, `sdpa`.
"""

from healpass.ops.attention import (
    exact_chunks,
    flex,
    floats,
    integers,
    paged,
    quantize,
    sdpa,
)
from healpass.ops.products import (
    digits,
    matmul,
    sharded,
    special,
    tensor_parallel,
    weighted_sum,
)
from healpass.ops.reproducible import (
    binary,
    elementary,
    embedding,
    norms,
    reduce,
    softmax,
    ties,
)

__all__ = [
    "binary",
    "digits",
    "elementary",
    "embedding",
    "exact_chunks",
    "flex",
    "floats",
    "integers",
    "matmul",
    "norms",
    "paged",
    "quantize",
    "reduce",
    "sdpa",
    "sharded",
    "softmax",
    "special",
    "tensor_parallel",
    "ties",
    "weighted_sum",
]
