"""The templates on a GPU: bounds, equal rows and tiles, gradients, CUDA graphs, symbolic sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from healpass.lowering.cuda import matmul, selfcheck, selfcheck_matmul
from healpass.lowering.cuda.tiles import Tile
from tests.support.template_bounds import template_bound

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: In and out features: SmolLM2's gate and down projections, Llama-3-8B's output projection.
LAYERS = ((576, 1536), (1536, 576), (4096, 4096))


def values(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    """Normal numbers, rows differing in magnitude by 2^20, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.randint(-10, 11, (*shape[:-1], 1), generator=generator)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).cuda()


def multiply(a: Tensor, b: Tensor, numerics: str = "heal") -> Tensor:
    """Through freshly compiled code."""
    return selfcheck_matmul.on_gpu(torch.cuda.current_device())(a, b, numerics)


def assert_within_bound(a: Tensor, b: Tensor, result: Tensor, numerics: str = "heal") -> None:
    error = (result.double() - a.double() @ b.double()).abs().cpu()
    ratio = (error / template_bound(a.cpu(), b.cpu(), numerics)).max().item()
    print(f"observed / bound = {ratio:.3g}")
    assert ratio <= 1


@pytest.mark.parametrize("template", selfcheck.every())
def test_every_template_passes_its_own_check(template):
    found = selfcheck.answers(f"cuda:{torch.cuda.current_device()}", template)
    assert found[template] is None


def test_a_second_process_gives_the_verdict():
    assert selfcheck.verdict(torch.cuda.current_device(), "decode") is None


@pytest.mark.parametrize("numerics", ["heal", "layercast"])
@pytest.mark.parametrize("right", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", [(1, 576, 576), (13, 70, 333), (77, 130, 65), (300, 129, 1000)])
def test_products_are_within_their_bound(shape, right, numerics):
    m, n, k = shape
    a, b = values(m, k), values(n, k, dtype=right, seed=1).t()
    assert_within_bound(a, b, multiply(a, b, numerics), numerics)


@pytest.mark.parametrize("left", [BF16, FP16])
@pytest.mark.parametrize("m", [5, 100])
def test_sixteen_bit_operands_are_within_their_bound(m, left):
    a, b = values(m, 500, dtype=left), values(500, 96, dtype=BF16, seed=1)
    assert_within_bound(a, b, multiply(a, b))


@pytest.mark.parametrize("numerics", ["heal", "layercast"])
def test_batches_are_within_their_bound(numerics):
    a, b = values(5, 70, 64), values(5, 90, 64, seed=1).mT
    assert_within_bound(a, b, multiply(a, b, numerics), numerics)


@pytest.mark.parametrize("numerics", ["heal", "layercast"])
@pytest.mark.parametrize("counts", [(1, 2, 7, 16), (17, 64, 100, 129, 512, 4096)])
def test_a_row_does_not_depend_on_the_number_of_rows(counts, numerics):
    a, b = values(counts[-1], 576), values(1536, 576, dtype=BF16, seed=1).t()
    whole = multiply(a, b, numerics)
    for count in counts[:-1]:
        assert torch.equal(multiply(a[:count], b, numerics), whole[:count]), count


@pytest.mark.parametrize(
    ("precision", "right"), [("heal", BF16), ("heal", FP32), ("layercast", BF16)]
)
def test_m_invariant_rows_are_equal_for_every_number_of_rows(right, precision):
    a, b = values(1000, 576), values(1536, 576, dtype=right, seed=1).t()
    numerics = f"{precision}:::m_invariant"
    whole = multiply(a, b, numerics)
    for count in (1, 16, 17, 129):
        assert torch.equal(multiply(a[:count], b, numerics), whole[:count]), count


@pytest.mark.parametrize("right", [BF16, FP32])
def test_the_copy_engine_gives_the_same_bits(right, monkeypatch):
    a, b = values(600, 576), values(1536, 576, dtype=right, seed=1).t()
    fetched = multiply(a, b)
    monkeypatch.setattr(matmul, "TMA_CAPABILITY", 999)
    assert torch.equal(fetched, multiply(a, b))


def test_routed_rows_are_within_their_bound():
    torch._dynamo.reset()
    a, b = values(300, 576), values(4, 256, 576, dtype=BF16, seed=1).mT
    ends = torch.tensor([40, 40, 171, 290], dtype=torch.int32, device="cuda")
    routed = torch.compile(lambda x: torch.ops.heal.grouped_mm(x, b, ends, "heal"), backend="heal")
    result, start = routed(a), 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            error = (result[start:end].double() - a[start:end].double() @ b[group].double()).abs()
            bound = template_bound(a[start:end].cpu(), b[group].cpu(), decode=False)
            assert (error.cpu() <= bound).all()
        start = end
    assert not result[start:].any()


def test_a_packed_weight_is_within_its_bound():
    torch._dynamo.reset()
    layer = torch.nn.Linear(576, 1536, bias=False, dtype=BF16, device="cuda").requires_grad_(False)
    options = {"prepack": True, "outputs": "fp32", "mode": "reduce-overhead"}
    compiled = torch.compile(layer, backend="heal", options=options)
    x = values(64, 576).to(BF16)
    for _ in range(3):
        assert_within_bound(x.float(), layer.weight.t(), compiled(x))


def test_autotuning_gives_the_same_bits():
    a, weight = values(512, 576), values(1536, 576, dtype=BF16, seed=1)
    plain = multiply(a, weight.t())
    torch._dynamo.reset()
    tuned = torch.compile(
        lambda x: torch.ops.heal.mm(x, weight.t(), "heal"),
        backend="heal",
        options={"autotune": True},
    )
    assert torch.equal(tuned(a), plain)


@pytest.mark.parametrize("right", [BF16, FP32])
def test_every_tile_gives_the_same_bits(right, monkeypatch):
    """With BLOCK_M = 32 the compiler takes mma.sync, from 64 on wgmma: the same bits, too."""
    a, b = values(200, 576), values(300, 576, dtype=right, seed=1).t()
    tiles = [Tile(128, 128, 8, 3), Tile(64, 128, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)]
    results = {}
    for tile in tiles:
        monkeypatch.setattr(matmul, "gemm_tiles", lambda *_, tile=tile, **__: [tile])
        results[tile] = multiply(a, b)
    differing = {t: (r != results[tiles[0]]).float().mean().item() for t, r in results.items()}
    assert not any(differing.values()), f"share of elements that differ: {differing}"


def test_cutting_in_registers_gives_the_same_bits(monkeypatch):
    a, b = values(200, 576), values(200, 576, dtype=BF16, seed=1).t()
    results = []
    for few in (0, 10_000):
        monkeypatch.setattr(matmul, "FEW_COLUMNS", few)
        monkeypatch.setattr(matmul, "FEW_ROWS", few)
        results.append(multiply(a, b))
    assert torch.equal(*results)


@pytest.mark.parametrize("m", [3, 40])
def test_infinities_and_nans_are_those_of_fp32(m):
    a, b = values(m, 128), values(128, 64, dtype=BF16, seed=1)
    a[0, 5], a[1, 6], b[7, 3], b[8, 4] = torch.inf, torch.nan, torch.inf, -torch.inf
    expected, result = a @ b.float(), multiply(a, b)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[result.isinf()], expected[expected.isinf()])


@pytest.mark.parametrize(("inputs", "outputs"), LAYERS)
@pytest.mark.parametrize("rows", [8, 512])
def test_a_layer_and_its_gradients_are_within_their_bounds(inputs, outputs, rows):
    torch._dynamo.reset()
    x = values(rows, inputs).requires_grad_()
    weight = values(outputs, inputs, dtype=BF16, seed=1).requires_grad_()
    grad = values(rows, outputs, seed=2)
    layer = torch.compile(lambda a, w: torch.ops.heal.linear(a, w, None, "heal"), backend="heal")
    result = layer(x, weight)
    result.backward(grad)
    assert_within_bound(x.detach(), weight.detach().t(), result.detach())
    assert_within_bound(grad, weight.detach(), x.grad)
    exact = grad.double().t() @ x.detach().double()
    bound = template_bound(grad.t().cpu(), x.detach().cpu()) + exact.abs().cpu() * 2.0**-8
    assert ((weight.grad.double() - exact).abs().cpu() <= bound).all()


def test_cuda_graphs_and_symbolic_rows_give_the_same_bits():
    weight = values(1536, 576, dtype=BF16, seed=1)

    def product(a: Tensor) -> Tensor:
        return torch.ops.heal.mm(a, weight.t(), "heal")

    a = values(200, 576)
    plain = multiply(a, weight.t())
    torch._dynamo.reset()
    graphed = torch.compile(product, backend="heal", options={"mode": "reduce-overhead"})
    for _ in range(3):
        assert torch.equal(graphed(a), plain)
    torch._dynamo.reset()
    symbolic = torch.compile(product, backend="heal", dynamic=True)
    assert torch.equal(symbolic(a), plain)
    assert torch.equal(symbolic(a[:100]), plain[:100])
