"""Contenders that only GPUs have: what their kernels compute, and what compilers make of them."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from healpass.bench import products
from healpass.bench.command import Request
from healpass.bench.contenders import CONTENDERS, REFERENCE, choose, default
from healpass.bench.products import BLOCK_N, PRODUCTS, WARPS, Product
from healpass.bench.run import limit, relative_error
from healpass.bench.source import ShapesSource
from healpass.bench.subject import Subject
from healpass.bench.workloads import Workload
from healpass.errors import ConfigError
from tests.support import interpreter
from tests.support.fake_cuda import Device, fake_cuda

#: Unit roundoff of FP32 and of BF16.
U, U16 = 2.0**-24, 2.0**-8
#: What cutting FP32 into pieces loses, relative to |x|, by `input_precision`: p pieces of t bits,
#: each rounded to nearest, leave (2^-t)^p. A BF16 weight is one piece of each, with nothing left.
CUT = {"tf32": 2.0**-11, "tf32x3": 2.0**-22, "bf16x6": 2.0**-24, "ieee": 0.0}
TRITON = ("tf32x3", "bf16x6", "bf16-invariant")
SOURCE = ShapesSource("smollm2-135m")


def multiply(product: Product, activation: Tensor, weight: Tensor) -> Tensor:
    """The product in Triton's interpreter, its output poisoned with NaN beforehand."""

    def poisoned(*shape: int, **kind: object) -> Tensor:
        return torch.full(shape, math.nan, **kind)

    with (
        interpreter.interpreted(products.tile_product) as kernel,
        mock.patch.object(products, "tile_product", kernel),
        mock.patch.object(products.torch, "empty", poisoned),
    ):
        return product(activation, weight)


def operands(m: int, n: int, k: int, product: Product) -> tuple[Tensor, Tensor]:
    """Rows of very different sizes, and a BF16 weight."""
    generator = torch.Generator().manual_seed(m * n + k)
    scale = 2.0 ** torch.arange(m).remainder(40).sub(20)
    activation = torch.randn(m, k, generator=generator) * scale[:, None]
    return activation.to(product.activation), torch.randn(n, k, generator=generator).bfloat16()


def over_bound(product: Product, activation: Tensor, weight: Tensor, found: Tensor) -> float:
    """Observed / bound, the largest.

    A step of K is summed in FP64 here and rounded to FP32, so that s steps round s times, each by
    at most u of sum |x||w| (1 + s u); cutting loses `CUT` of it; an output in BF16 rounds once.
    """
    exact = activation.double() @ weight.double().t()
    mass = activation.double().abs() @ weight.double().abs().t()
    steps = math.ceil(weight.shape[1] / product.block_k)
    bound = (CUT[product.precision] + steps * U * (1 + steps * U)) * mass
    if product.activation == torch.bfloat16:
        bound = bound + U16 * (exact.abs() + bound)
    return ((found.double() - exact).abs() / bound).max().item()


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 130, 65), (65, 5, 200), (130, 129, 33)], ids=str)
def test_a_product_keeps_its_bound(name, shape):
    product = PRODUCTS[name]
    activation, weight = operands(*shape, product)
    found = multiply(product, activation, weight)
    ratio = over_bound(product, activation, weight, found)
    print(f"{name}, {shape}: observed / bound {ratio:.3f}")
    assert found.dtype == product.activation
    assert ratio <= 1


def test_one_tf32_piece_is_no_emulation_of_fp32():
    """The bound notices what the pieces are for."""
    emulation = PRODUCTS["tf32x3"]
    activation, weight = operands(3, 130, 65, emulation)
    found = multiply(replace(emulation, precision="tf32"), activation, weight)
    assert over_bound(emulation, activation, weight, found) > 100


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)], ids=str)
def test_nothing_times_something_is_nothing(shape):
    activation, weight = operands(*shape, PRODUCTS["tf32x3"])
    assert multiply(PRODUCTS["tf32x3"], activation, weight).shape == shape[:2]


def test_leading_sizes_and_strides_are_followed():
    product = PRODUCTS["bf16x6"]
    activation, weight = operands(6, 5, 8, product)
    plain = multiply(product, activation, weight)
    strided = torch.stack([activation, activation], -1)[..., 0].view(2, 3, 8)
    assert not strided.is_contiguous()
    assert multiply(product, strided, weight.t().contiguous().t()).equal(plain.view(2, 3, 5))


def alone_and_among_others(product: Product, single: Product) -> tuple[Tensor, Tensor]:
    """The first rows of an activation, each multiplied alone, and as a part of it."""
    activation, weight = operands(130, 40, 700, product)
    alone = [multiply(single, activation[i : i + 1], weight) for i in range(5)]
    return torch.cat(alone), multiply(product, activation, weight)[:5]


def test_a_row_of_the_invariant_product_has_the_same_bits_in_every_batch():
    alone, among = alone_and_among_others(PRODUCTS["invariant"], PRODUCTS["invariant"])
    assert alone.equal(among)


def test_another_step_of_k_gives_other_bits():
    """Seen in FP32; rounding to BF16 would hide most of it."""
    product = replace(PRODUCTS["bf16x6"], follows_rows=False)
    alone, among = alone_and_among_others(product, replace(product, block_k=16))
    assert not alone.equal(among)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 64, 65, 128, 4096])
def test_only_emulations_follow_the_number_of_rows(name, rows):
    product = PRODUCTS[name]
    assert product.block_m(rows) == (16 if name != "invariant" and rows <= 64 else 128)


def cubin(product: Product, rows: int, capability: int) -> dict[str, str | bytes]:
    """What Triton's compiler makes of it, ahead of time."""
    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[product.activation]
    constants = {
        "PRECISION": product.precision,
        "BLOCK_M": product.block_m(rows),
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": product.block_k,
    }
    signature = {"X": kind, "W": "*bf16", "OUT": kind} | dict.fromkeys("MNK", "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(products.tile_product, signature, constexprs=constants)
    with fake_cuda(Device(capability)):
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"num_warps": WARPS}).asm


def multiplying(ptx: str) -> list[str]:
    """The lines of a tensor core; a folder's name may have "mma" in it, too."""
    return [line for line in ptx.splitlines() if "mma" in line and ".f32." in line]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_compiles_to_tensor_core_code(name, rows, capability):
    built = cubin(PRODUCTS[name], rows, capability)
    assert built["cubin"]
    found = "tf32" if name == "tf32x3" else "bf16"
    lines = multiplying(built["ptx"])
    assert lines
    assert all(found in line for line in lines), lines[:3]


def test_ieee_fp32_uses_no_tensor_core():
    """What the check above would see if Triton ignored the precision."""
    ptx = cubin(replace(PRODUCTS["tf32x3"], precision="ieee"), 1, 80)["ptx"]
    assert not multiplying(ptx)


@pytest.mark.parametrize("name", TRITON)
def test_the_gate_lets_the_kernels_through_and_stops_a_broken_one(name):
    """The contender's layers in the interpreter, judged as `run` judges them."""
    work = Workload("decode", 1)
    judged = CONTENDERS[name]
    eager = {n: Subject(CONTENDERS[n], SOURCE, "cpu") for n in (judged.yardstick, REFERENCE)}
    found = {n: work.prepare(s).outputs().double().detach().numpy() for n, s in eager.items()}
    subject = Subject(replace(judged, compiler="eager"), SOURCE, "cpu")
    product = PRODUCTS[judged.linear]
    for layer in subject.module.layers:
        layer.product = lambda x, w: multiply(product, x, w)
    outputs = work.prepare(subject).outputs().detach()
    yardstick = relative_error(found[judged.yardstick], found[REFERENCE])
    allowed = limit(yardstick, torch.finfo(outputs.dtype).eps / 2)
    error = relative_error(outputs.double().numpy(), found[REFERENCE])
    print(f"{name}: error {error:.3g}, limit {allowed:.3g}")
    assert error <= allowed
    assert relative_error(1.01 * outputs.double().numpy(), found[REFERENCE]) > allowed


@pytest.mark.parametrize("name", TRITON)
def test_dynamo_takes_the_kernels_into_one_graph(name):
    """`fullgraph` is asked for, so that Inductor fuses what stands around the kernel."""
    subject = Subject(CONTENDERS[name], SOURCE, "cpu")
    graphs = []

    def look(graph: torch.fx.GraphModule, _inputs: object) -> object:
        graphs.append(graph)
        raise NotImplementedError("looked at, not run")

    # Dynamo lists torch's functions once; the stand-ins of a fake GPU must not be among them.
    torch.compile(torch.relu, backend="eager")(torch.ones(1))
    step = torch.compile(subject.module.layers[0], backend=look, fullgraph=True, dynamic=False)
    failed = torch._dynamo.exc.BackendCompilerFailed
    with fake_cuda(Device(90)), pytest.raises(failed, match="looked at"):
        step(torch.ones(2, 576, dtype=subject.activation_dtype))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert "triton_kernel_wrapper_mutation" in targets


def request(device: str, *contenders: str) -> Request:
    return Request("", SOURCE.name, device, ("decode",), contenders, 1, None, None)


@pytest.mark.parametrize("name", [*TRITON, "bf16-flash"])
def test_a_cpu_has_no_such_contender(name):
    with pytest.raises(ConfigError, match=f"--contenders {name} needs --device cuda"):
        request("cpu", name).plan()
    assert choose([name], "cuda") == (CONTENDERS[name],)


def test_a_gpu_compares_all_that_it_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = [contender.name for contender in request("cuda").plan().contenders]
    assert set(names) == set(default("cpu")) | {*TRITON, "bf16-flash"}
    assert not {*TRITON, "bf16-flash"} & set(default("cpu"))


@pytest.mark.parametrize(
    ("name", "work"),
    [("tf32x3", Workload("attention", 8)), ("bf16-flash", Workload("decode", 1)),
     ("bf16x6", Workload("train", 8))],
    ids=["tf32x3", "flash", "bf16x6"],
)  # fmt: skip
def test_a_contender_does_not_stand_for_another_one(name, work):
    with pytest.raises(ConfigError, match=f"{name} has nothing to measure here"):
        work.prepare(Subject(CONTENDERS[name], SOURCE, "cpu"))
