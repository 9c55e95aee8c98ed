"""Python around tensors: containers, keywords, graph breaks, numbers from tensors, subclasses."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tests.programs.record import program


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def named_tuple(x, w):
    return Pair((x @ w).exp(), (x @ w).sum())


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def dataclass_result(x, w):
    logits = F.gelu(x) @ w
    return Output(logits=logits, loss=logits.square().mean())


@program(lambda r: ({"x": r(3, 4), "scale": [r(4), r(4)]}, r.weight(4, 4)))
def dictionary(batch, w):
    y = batch["x"] * batch["scale"][0]
    return {"hidden": [y.exp()], "logits": (y @ w, None), "count": y.shape[0]}


@program(lambda r: ((r(3, 4), (r(4), None)), r.weight(4, 4)))
def nested_tuples(args, w):
    x, (b, _) = args
    return ((x @ w + b).tanh(), (b * 2,))


def variadic(*args, scale=1.0, **kwargs):
    return sum(a * scale for a in args) + kwargs.get("bias", 0)


@program(lambda r: (r(3, 4), r(3, 4), r(4)))
def stars(x, y, b):
    return variadic(x, y, *[y], scale=0.3, bias=b).softmax(-1)


@program(lambda r: (r(3, 4), r.weight(4, 4)), coarse="a graph break hands on traced dtypes")
def item(x, w):
    y = x @ w
    scale = y.abs().max().item()
    return y.tanh() / (1 + scale)


@program(lambda r: (r(3, 4), r.weight(4, 4)), coarse="a graph break hands on traced dtypes")
def graph_break(x, w):
    y = x @ w
    torch._dynamo.graph_break()
    return (y @ w).tanh() + x


@program(lambda r: (r(3, 4), r.weight(4, 4)), coarse="a graph break hands on traced dtypes")
def prints(x, w):
    y = x @ w
    print("mean", y.shape)
    return (y @ w).tanh()


@program(lambda r: (r(3, 4), r.weight(4, 4)), coarse="a graph break hands on traced dtypes")
def branches_on_data(x, w):
    y = x @ w
    return (y @ w).tanh() if y.sum() > 0 else (y @ w).sin()


@torch._dynamo.disable
def outside(x):
    return x * 1.1


@program(lambda r: (r(3, 4), r.weight(4, 4)), coarse="a disabled function runs as torch has it")
def disabled_function(x, w):
    return outside(x @ w).tanh() @ w


@program(lambda r: (r(3, 4), r.weight(4, 4)), coarse="a graph break hands on traced dtypes")
def to_list(x, w):
    y = (x @ w).sum(0).tolist()
    return x * y[0]


@program(lambda r: (r(12, 8), torch.tensor([5, 7])), grads=False)
def sizes_from_data(x, lengths):
    a, b = lengths.tolist()
    return (x[:a].exp().sum(0) * 1.1 + x[a : a + b].softmax(-1).sum(0)).log()


@program(lambda r: (r(3, 4), None), grads=True)
def optional_argument(x, mask):
    if mask is None:
        mask = torch.ones_like(x)
    return (x * mask).exp()


@program(lambda r: (r(3, 4), "gelu"))
def dispatches_on_a_string(x, name):
    return {"gelu": F.gelu, "relu": F.relu}[name](x) * 1.1


class Stateful:
    def __init__(self, scale):
        self.scale = scale
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * self.scale + self.calls


@program(lambda r: (r(3, 4),))
def object_with_state(x):
    double = Stateful(1.1)
    return double(double(x)).exp()


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def closures(x, w):
    def inner(y, n=2):
        return y if n == 0 else inner((y @ w).tanh(), n - 1)

    return inner(x)


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def try_and_finally(x, w):
    try:
        y = x @ w
        if y.dim() == 5:
            raise ValueError("never")
    except ValueError:
        y = x
    finally:
        z = x.exp()
    return y.sigmoid() * z


class Tagged(torch.Tensor):
    """A subclass without behaviour of its own."""


@program(
    lambda r: (r(3, 4), r.weight(4, 4)),
    grads=False,
    dtypes=(torch.bfloat16, torch.float32),
    coarse="the class of a subclass defines its products",
)
def tensor_subclass(x, w):
    return (x.as_subclass(Tagged) @ w).tanh().as_subclass(torch.Tensor)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.gate = nn.ParameterList([nn.Parameter(torch.ones(4))])

    def forward(self, x, *, which="a", **rest):
        return self.layers[which](x) * self.gate[0] + rest.get("shift", 0)


@program(lambda r: (r(3, 4), r.module(Gated)))
def keywords_of_a_module(x, module):
    return module(x, which="b", shift=0.5).exp()


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def lambda_and_map(x, w):
    return torch.stack(list(map(lambda row: (row @ w).softmax(-1), x)))  # noqa: C417


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def enumerates_and_zips(x, w):
    return torch.cat([a[None] @ w * i for i, (a, _) in enumerate(zip(x, w, strict=False), 1)])


@program(lambda r: (r(3, 4),))
def asserts_on_data(x):
    torch._check(x.shape[0] > 1)
    assert x.dim() == 2
    return x.softmax(-1) * 1.1


@program(lambda r: (r(3, 4), 3, 0.3, True))
def plain_numbers(x, repeats, factor, flag):
    for _ in range(repeats):
        x = x * factor + (1 if flag else 0)
    return x, repeats, factor


@program(lambda r: (r(3, 4), r(3, 4)))
def size_object(x, y):
    rows, columns = x.size()
    return y.new_ones(x.shape) * x.exp() / (rows * columns) + torch.Size([1]).numel()


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def context_managers(x, w):
    with (
        torch.profiler.record_function("name"),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        return (x @ w).tanh()
