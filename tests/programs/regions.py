"""Higher-order operators, autocast, random numbers, custom operators, other devices of torch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import associative_scan, scan, while_loop
from torch._higher_order_ops.map import map as torch_map

from tests.programs.record import program

LOOP = "a loop hands on what it takes in, in the dtypes it was traced with"


def tanh_of_product(x, w):
    return (x @ w).tanh()


def sin_of_product(x, w):
    return (x @ w).sin()


def cond_reference(x, w):
    return tanh_of_product(x, w) * 1.1 if x.sum() > 0 else sin_of_product(x, w) * 1.1


@program(lambda r: (r(3, 4), r.weight(4, 4)), reference=cond_reference)
def cond(x, w):
    return torch.cond(x.sum() > 0, tanh_of_product, sin_of_product, (x, w)) * 1.1


def cond_of_input_reference(x, w):
    return (tanh_of_product(x, w) if x.sum() > 0 else x) * 1.1


@program(
    lambda r: (r.positive(3, 4), r.weight(4, 4)), reference=cond_of_input_reference, grads=False
)
def cond_that_passes_on(x, w):
    return torch.cond(x.sum() > 0, tanh_of_product, lambda x, w: x.clone(), (x, w)) * 1.1


def halve(i, x):
    return i + 1, x * 0.75


def while_reference(x):
    for _ in range(3):
        x = x * 0.75
    return x + 1


@program(lambda r: (r(3, 4),), reference=while_reference, coarse=LOOP, grads=False)
def while_loops(x):
    return while_loop(lambda i, x: i < 3, halve, (torch.tensor(0), x))[1] + 1


def step(carry, x):
    new = carry * 0.5 + x.tanh()
    return new, new * 2


def scan_reference(init, xs):
    outputs = []
    for x in xs:
        init, y = step(init, x)
        outputs.append(y)
    return init, torch.stack(outputs)


@program(lambda r: (r(4), r(5, 4)), reference=scan_reference, coarse=LOOP, grads=False)
def scans(init, xs):
    return scan(step, init, xs)


def multiply_add(a, b):
    return a[0] * b[0], a[1] * b[0] + b[1]


def associative_reference(a, b):
    h, states = torch.zeros_like(b[0]), []
    for decay, x in zip(a, b, strict=True):
        h = h * decay + x
        states.append(h)
    return torch.stack(states)


@program(lambda r: (r(6, 4), r(6, 4)), reference=associative_reference, coarse=LOOP, grads=False)
def associative_scans(a, b):
    return associative_scan(multiply_add, (a, b), 0, combine_mode="generic")[1]


def map_reference(xs, w):
    return torch.stack([tanh_of_product(x, w) for x in xs])


@program(lambda r: (r(3, 2, 4), r.weight(4, 4)), reference=map_reference, coarse=LOOP, grads=False)
def maps(xs, w):
    return torch_map(tanh_of_product, xs, w)


@torch.compiler.nested_compile_region
def region(x, w):
    return F.rms_norm(x @ w, (8,))


def region_reference(x, w):
    for _ in range(2):
        x = F.rms_norm(x @ w, (8,))
    return x * 1.1


@program(lambda r: (r(3, 8), r.weight(8, 8)), reference=region_reference)
def nested_region(x, w):
    return region(region(x, w), w) * 1.1


@torch.library.custom_op("heal_test_programs::scale", mutates_args=())
def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@scale.register_fake
def _(x, factor):
    return torch.empty_like(x)


scale.register_autograd(lambda ctx, g: (g * 1.5, None))


@program(
    lambda r: (r(3, 4), r.weight(4, 4)),
    reference=lambda x, w: (x @ w * 1.5).tanh(),
    coarse="a custom operator runs at the dtypes it was traced with",
)
def custom_operator(x, w):
    return torch.ops.heal_test_programs.scale(x @ w, 1.5).tanh()


@program(lambda r: (r(3, 8), r.weight(8, 8), r.weight(8)), narrow=True)
def autocast_inside(x, w, b):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = F.linear(x, w, b)
        h = F.gelu(h) @ w
    return h.float().softmax(-1)


@program(lambda r: (r(3, 8), r.module(nn.Linear, 8, 8)), narrow=True)
def autocast_with_an_island(x, layer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = layer(x)
        with torch.autocast("cpu", enabled=False):
            h = h.float().softmax(-1)
        return layer(h).float()


@functools.partial(torch.autocast("cpu", dtype=torch.bfloat16))
def decorated(x, w):
    return F.layer_norm(x @ w, (8,)) @ w


@program(lambda r: (r(3, 8), r.weight(8, 8)), narrow=True)
def autocast_as_decorator(x, w):
    return decorated(x, w).float()


def dropout_reference(results, x, w):
    kept = (results[0] != 0).to(results[1].dtype) * 2
    return kept, (x @ w) * kept


@program(lambda r: (r(4, 8), r.weight(8, 8)), replay=dropout_reference)
def dropout_mask(x, w):
    kept = F.dropout(torch.ones_like(x), 0.5)
    return kept, (x @ w) * kept


@program(
    lambda r: (r.positive(4, 8), r.weight(8, 8)),
    replay=lambda y, x, w: F.gelu(x @ w) * 2 * (y != 0),
)
def dropout_of_a_layer(x, w):
    return F.dropout(F.gelu(x @ w), 0.5)


@program(
    lambda r: (r(4, 6),),
    replay=lambda results, x: (results[0].to(x.dtype), x + 0.1 * results[0].to(x.dtype)),
    dtypes=(torch.float32,),
)
def noise(x):
    drawn = torch.randn_like(x)
    return drawn, x + 0.1 * drawn


@program(
    lambda r: (r(4, 6), r.weight(6, 6)),
    replay=lambda results, x, w: (results[0], F.one_hot(results[0], 6) * (x @ w).softmax(-1)),
    grads=False,
)
def samples_tokens(x, w):
    probabilities = (x @ w).softmax(-1)
    chosen = torch.multinomial(probabilities, 1).squeeze(-1)
    return chosen, F.one_hot(chosen, 6) * probabilities


@program(
    lambda r: (r(4, 6),),
    replay=lambda results, x: (results[0], (x.exp())[results[0]]),
)
def shuffles(x):
    order = torch.randperm(4)
    return order, x.exp()[order]


@program(
    lambda r: (r(4, 6), r.weight(6, 6)),
    replay=lambda results, x, w: (results[0], torch.where(results[0], x @ w, x) * 1.1),
)
def stochastic_depth(x, w):
    keep = torch.rand(x.shape[0], 1) < 0.5
    return keep, torch.where(keep, x @ w, x) * 1.1


@program(lambda r: (r(4, 6), r.weight(6, 6)))
def inference_mode_inside(x, w):
    y = x @ w
    with torch.no_grad():
        gate = y.sigmoid()
    return y * gate


@program(lambda r: (r(4, 6).to_sparse(), r.weight(6, 3)), grads=False, exact="one product")
def sparse_product(x, w):
    return torch.sparse.mm(x.float(), w.float())


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def device_of_an_operand(x, w):
    mask = torch.ones(x.shape[-1], device=x.device, dtype=w.dtype)
    return (x.to(w.device) @ w * mask).cpu().sigmoid()
