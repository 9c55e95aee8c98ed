"""Random programs through the backend: every output element within its propagated bound.

A program is drawn as a list of steps over `[B, L, D]`. It is run from one description: in torch
through `backend="heal"`, in FP32, in FP64 with errors propagated, and, for the inverse test, with
one low piece dropped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given
from hypothesis import strategies as st

from healpass.arithmetic.pieces import split_fp16
from healpass.arithmetic.propagate import Analysis, Arithmetic, Estimate, exact, propagate
from tests.support.profiles import examples

D = 48
HEADS = 6


@dataclass(frozen=True)
class Program:
    """A random network.

    Attributes:
        steps: Names of steps, applied in turn.
        batch: B.
        length: L.
        magnitude: Size of the input.
        half: Whether inputs and weights are BF16.
        seed: Of inputs and weights.
    """

    steps: tuple[str, ...]
    batch: int
    length: int
    magnitude: float
    half: bool
    seed: int

    def tensors(self) -> list[torch.Tensor]:
        """The input, then three weights per step."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(self.batch, self.length, D)] + 3 * len(self.steps) * [(D, D)]
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        tensors = [tensors[0] * self.magnitude, *(w / D**0.5 for w in tensors[1:])]
        return [t.bfloat16() if self.half else t for t in tensors]

    def run(self, call: Callable, x, *weights):
        """Apply the steps; `call(function, *args)` either calls or propagates."""
        earlier = x
        for i, step in enumerate(self.steps):
            before, w = x, weights[3 * i : 3 * i + 3]
            x = RUN[step](call, x, earlier, w)
            earlier = before
        return x


def attention(call, x, _earlier, w, kv_heads=HEADS):
    size = D // HEADS

    def heads(weight, count):
        y = call(F.linear, x, weight)
        y = call(torch.narrow, y, -1, 0, count * size)
        y = call(torch.Tensor.reshape, y, (*y_shape(y)[:-1], count, size))
        return call(torch.Tensor.transpose, y, 1, 2)

    q, k, v = heads(w[0], HEADS), heads(w[1], kv_heads), heads(w[2], kv_heads)
    gqa = {"enable_gqa": True} if kv_heads != HEADS else {}
    y = call(F.scaled_dot_product_attention, q, k, v, is_causal=True, **gqa)
    y = call(torch.Tensor.transpose, y, 1, 2)
    return call(torch.Tensor.reshape, y, (*y_shape(y)[:2], D))


def y_shape(y):
    return y.value.shape if isinstance(y, Estimate) else y.shape


def permuted(call, x, _earlier, w):
    """A product with a transposed, sliced and joined operand."""
    left, right = call(torch.narrow, x, -1, 0, D // 2), call(torch.narrow, x, -1, D // 2, D // 2)
    swapped = call(torch.cat, [right, left], -1)
    return call(torch.matmul, swapped, call(torch.Tensor.transpose, w[0], 0, 1))


def gate(call, x, _earlier, w):
    """A gated MLP without its way down."""
    return call(torch.mul, call(F.silu, call(F.linear, x, w[0])), call(F.linear, x, w[1]))


def cast(call, x, _earlier, _w):
    """Down to BF16 and back to what it was."""
    down = call(torch.Tensor.bfloat16, x)
    wide = isinstance(x, Estimate) or x.dtype == torch.float32
    return call(torch.Tensor.float, down) if wide else down


def matmul(call, x, _earlier, w):
    return call(torch.matmul, x, w[0])


def linear(call, x, _earlier, w):
    return call(F.linear, x, w[0])


def residual(call, x, earlier, _w):
    return call(torch.add, x, earlier)


def pointwise(function, *arguments):
    """A step that is one function of x."""
    return lambda call, x, _earlier, _w: call(function, x, *arguments)


RUN = {
    "linear": linear,
    "matmul": matmul,
    "attention": attention,
    "gqa": partial(attention, kv_heads=2),
    "rms_norm": pointwise(F.rms_norm, (D,), None, 1e-5),
    "layer_norm": pointwise(F.layer_norm, (D,), None, None, 1e-5),
    "residual": residual,
    "silu": pointwise(F.silu),
    "gelu": pointwise(F.gelu),
    "tanh": pointwise(torch.tanh),
    "gate": gate,
    "cast": cast,
    "softmax": pointwise(torch.softmax, -1),
    "permuted": permuted,
}
STEPS = tuple(RUN)
#: Computing nodes of the steps that have more than one.
NODES = {"attention": 4, "gqa": 4, "gate": 4, "permuted": 2}


def clipped(steps, most: int) -> tuple[str, ...]:
    """As many of the steps as stay within `most` computing nodes, but at least the first."""
    kept: list[str] = []
    for step in steps:
        if kept and sum(NODES.get(s, 1) for s in (*kept, step)) > most:
            break
        kept.append(step)
    return tuple(kept)


def programs(most: int = 8) -> st.SearchStrategy[Program]:
    drawn = st.lists(st.sampled_from(STEPS), min_size=1, max_size=most)
    return st.builds(
        Program,
        steps=drawn.map(lambda steps: clipped(steps, most)),
        batch=st.integers(1, 2),
        length=st.integers(2, 9),
        magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
        half=st.booleans(),
        seed=st.integers(0, 2**16),
    )


def direct(function, *args, **kwargs):
    return function(*args, **kwargs)


def estimate(program: Program, how: Arithmetic | None = None) -> Estimate:
    """Exact values, and the propagated bound as their error."""
    run = Analysis(how or Arithmetic(casts=False))
    y = program.run(partial(propagated, run), *(exact(t) for t in program.tensors()))
    return Estimate(y.value.detach(), run.refined(y).error)


def propagated(run, function, *args, **kwargs):
    return propagate(function, run, *args, **kwargs)


def worst_ratio(y: torch.Tensor, bound: Estimate) -> float:
    assert bound.error.isfinite().all(), "the bound says nothing"
    error = (y.double() - bound.value).abs()
    return torch.where(error == 0, 0.0, error / bound.error).max().item()


OPTIONS = {"outputs": "fp32", "kv": "fp32"}


@examples(40, deep=1000)
@given(programs(), st.booleans(), st.sampled_from(["fp32", "int16", "int24"]))
def test_a_compiled_graph_is_within_its_propagated_bound(program, dynamic, kv):
    """The whole backend, Inductor included, beside an FP32 run of the original."""
    torch._dynamo.reset()
    run, options = partial(program.run, direct), OPTIONS | {"kv": kv}
    compiled = torch.compile(run, backend="heal", dynamic=dynamic, options=options, fullgraph=True)
    bound = estimate(program, Arithmetic(kv=kv, casts=False))
    y = compiled(*program.tensors())
    assert y.dtype == torch.float32 or set(program.steps) == {"cast"}
    ratio = worst_ratio(y, bound)
    fp32 = worst_ratio(run(*(t.float() for t in program.tensors())), bound)
    event(f"observed / bound about 2^{math.frexp(ratio)[1]}")
    assert ratio <= 1, f"observed / bound = {ratio:.3g}, in FP32 {fp32:.3g}"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_is_within_the_bound_for_every_length(dynamic):
    """The whole backend, Inductor included; one dynamic program serves several lengths."""
    steps = ("rms_norm", "gqa", "residual", "layer_norm", "gate", "linear", "cast", "matmul")
    compiled = None
    for length in (5, 8, 3) if dynamic else (5,):
        program = Program(steps, 2, length, 1.0, True, length)
        if compiled is None:
            run = partial(program.run, direct)
            compiled = torch.compile(run, backend="heal", dynamic=dynamic, options=OPTIONS)
        ratio = worst_ratio(compiled(*program.tensors()), estimate(program))
        assert ratio <= 1, f"observed / bound = {ratio:.3g}"


def sample(most: int, count: int = 60) -> list[Program]:
    """A fixed sample of programs that begin with a linear layer, where statistics are asserted.

    No casts: they are dropped by the passes, and these run without.
    """
    steps = tuple(step for step in STEPS if step != "cast")
    chosen = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(steps), (most - 1,), generator=generator).tolist()
        drawn = ("linear", *(steps[i] for i in picks))
        chosen.append(Program(clipped(drawn, most), 2, 6, 1.0, False, seed))
    return chosen


def test_the_bound_means_something():
    """Median observed / bound over programs of up to 8 nodes is at least 1e-4."""
    ratios = [worst_ratio(p.run(direct, *p.tensors()), estimate(p)) for p in sample(8)]
    median = sorted(ratios)[len(ratios) // 2]
    print(f"median {median:.2e}, worst {max(ratios):.2e}")
    assert median >= 1e-4
    assert max(ratios) <= 1


class OnePiece:
    """Calls functions, the n-th matmul with one FP16 piece of its left operand instead of two."""

    def __init__(self, which: int):
        self.left = which

    def __call__(self, function, *args, **kwargs):
        if function in (F.linear, torch.matmul):
            if self.left == 0:
                split = split_fp16(args[0])
                args = (split.pieces[0].float() * split.scale, *args[1:])
            self.left -= 1
        return function(*args, **kwargs)


def noticed(program: Program, which: int) -> bool:
    y = program.run(OnePiece(which), *program.tensors())
    return worst_ratio(y, estimate(program)) > 1


def products_of(program: Program) -> int:
    """How many matmuls a program has, attention's own left out."""
    counter = OnePiece(-1)
    program.run(counter, *program.tensors())
    return -1 - counter.left


@pytest.mark.parametrize("most", [2, 8])
@pytest.mark.parametrize("place", ["first", "last"])
def test_dropping_one_low_piece_exceeds_the_bound(most, place):
    """In 90% of the programs of up to 8 nodes, whatever precedes or follows the node."""
    programs = sample(most)
    lost = [0 if place == "first" else products_of(program) - 1 for program in programs]
    share = sum(map(noticed, programs, lost)) / len(programs)
    print(f"up to {most} nodes, {place}: noticed in {share:.0%}")
    assert share >= 0.9


def test_a_norm_bounds_what_reaches_it_unbounded():
    """Attention's worst case at this size exceeds the variance of its rows; LayerNorm's cannot."""
    program = Program(("linear", "attention", "layer_norm"), 1, 2, 30.0, False, 0)
    bound = estimate(program).error
    print(f"largest bound {bound.max():.3g}")
    assert bound.isfinite().all()


def test_a_layer_norm_of_nearly_constant_rows_is_within_its_bound():
    """The variance is lost in roundings of the mean: rows differ by 1 to 1e6 last places."""
    generator = torch.Generator().manual_seed(0)
    places = 10.0 ** (torch.arange(210)[:, None] % 7)
    for size in (1.0, 1e2, 1e4, 1e6):
        noise = torch.randn(210, D, generator=generator) * places
        x = (size * (1 + 2.0**-23 * noise.round().double())).float()
        bound = propagate(F.layer_norm, Analysis(), exact(x), (D,))
        for y in (F.layer_norm(x, (D,)), torch.compile(F.layer_norm)(x, (D,))):
            error = (y.double() - bound.value.detach()).abs()
            print(f"size {size:g}: observed / bound {(error / bound.error).max():.3g}")
            assert (error <= bound.error).all()


def test_what_has_no_rule_is_refused():
    x = exact(torch.ones(2, 2))
    with pytest.raises(ValueError, match="no error rule for 'cumsum'"):
        propagate(torch.cumsum, Analysis(), x, 0)
    with pytest.raises(ValueError, match="dropout"):
        propagate(F.scaled_dot_product_attention, Analysis(), x, x, x, None, 0.5)
    with pytest.raises(ValueError, match="exponent 3"):
        propagate(torch.pow, Analysis(), x, 3)


def test_an_unbounded_error_is_infinite_not_small():
    zero = Estimate(torch.zeros(1).double(), torch.ones(1).double())
    assert propagate(torch.rsqrt, Analysis(), zero).error.isinf()
    assert propagate(torch.div, Analysis(), exact(torch.ones(1)), zero).error.isinf()
