"""What the CUDA lowering decides: families, chunks, fusion, fallbacks. Fake CUDA, no GPU."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.exc import InductorError

from healpass import HealConfig
from healpass.cache_key import CacheKey
from healpass.lowering.cuda import matmul, selfcheck, tiles
from tests.support.fake_cuda import Device, always, generated_source, kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def linear(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (torch.ops.heal.mm(x, weight.t(), "heal"),)


def options(**chosen: bool) -> CacheKey:
    """What carries the options of a compile to the lowering."""
    return CacheKey(HealConfig(**chosen))


def templates(source: str) -> list[str]:
    return [kernel.source for kernel in kernels(source) if kernel.is_template]


@pytest.mark.parametrize("k", [1, 63, 64, 65, 576, 1536, 4096, 14336, 53248])
def test_chunks_cover_k_once(k):
    chunk, splits = matmul.decode_chunk(k)
    assert chunk % matmul.BLOCK_K == 0
    assert (splits - 1) * chunk < k <= splits * chunk
    assert splits <= matmul.MOST_CHUNKS


@pytest.mark.parametrize(("rows", "family"), [(1, "decode"), (16, "decode"), (17, "gemm")])
def test_the_family_follows_from_the_rows(rows, family):
    source = generated_source(linear, [empty(rows, 256), empty(96, 256, dtype=BF16)])
    (text,) = templates(source)
    assert (
        "CHUNK : tl.constexpr" in text
        if family == "decode"
        else "A_PIECES : tl.constexpr = 2" in text
    )


@pytest.mark.parametrize("processors", [20, 132])
@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize(
    ("generation", "chain"), [((80, 86, 89), 32), ((90, 100, 120), 64)], ids=["A100", "H100"]
)
def test_numerics_knobs_do_not_depend_on_the_gpu_of_a_generation(
    generation, chain, rows, processors
):
    knobs = "A_PIECES|B_PIECES|A_SCALED|B_SCALED|BLOCK_K|CHAIN_K|CHUNK|SPLITS|FMA"
    found = set()
    for capability in generation:
        tensors = [empty(rows, 4096), empty(1024, 4096, dtype=BF16)]
        (text,) = templates(generated_source(linear, tensors, Device(capability, processors)))
        found.add(tuple(re.findall(rf"({knobs}) : tl.constexpr = (\w+)", text)))
    assert len(found) == 1
    (knobs_of,) = map(dict, found)
    assert knobs_of["CHAIN_K" if rows > 16 else "BLOCK_K"] == str(chain)


def test_producer_scale_and_split_are_one_kernel():
    def layer(x, gate, weight):
        return (torch.ops.heal.mm(F.silu(x) * gate, weight.t(), "heal"),)

    tensors = [empty(512, 576), empty(512, 576), empty(1536, 576, dtype=FP16)]
    producer, product = kernels(generated_source(layer, tensors))
    assert product.is_template
    assert "tl.sigmoid" in producer.source or "libdevice" in producer.source
    assert producer.source.count(".to(tl.float16)") == 2, "both pieces leave the producer's kernel"


@pytest.mark.parametrize("rows", [1, 512])
def test_bias_activation_and_residual_join_the_product(rows):
    def layer(x, weight, bias, residual):
        product = torch.ops.heal.linear(x, weight, bias, "heal")
        return (F.gelu(product) + residual,)

    shapes = [empty(rows, 128), empty(96, 128, dtype=FP16), empty(96, dtype=FP16), empty(rows, 96)]
    last = kernels(generated_source(layer, shapes))[-1]
    assert last.is_template
    assert "erf" in last.source


def test_a_prologue_joins_the_decode_kernel():
    def layer(x, weight):
        return (torch.ops.heal.mm(torch.relu(x), weight.t(), "heal"),)

    (only,) = kernels(generated_source(layer, [empty(4, 128), empty(96, 128, dtype=BF16)]))
    assert only.is_template


def test_the_partial_sums_are_added_in_order_in_the_consumer():
    def layer(x, weight, residual):
        return (torch.ops.heal.mm(x, weight.t(), "heal") + residual,)

    tensors = [empty(4, 1024), empty(96, 1024, dtype=BF16), empty(4, 96)]
    product, consumer = kernels(generated_source(layer, tensors))
    assert product.is_template
    assert "atomic" not in product.source
    _, splits = matmul.decode_chunk(1024)
    sums = re.findall(r"(tmp\d+) = (tmp\d+) \+ (tmp\d+)", consumer.source)
    assert len(sums) == splits, "splits - 1 partial sums and the residual"
    assert all(left == before for (before, _, _), (_, left, _) in itertools.pairwise(sums))


def test_symbolic_rows_stay_symbolic_and_get_the_family_of_their_value():
    tensors = [empty(500, 256), empty(96, 256, dtype=BF16)]
    (text,) = templates(generated_source(linear, tensors, dynamic=True))
    assert re.search(r"M = ks\d", text)
    assert "CHUNK" not in text


@pytest.mark.parametrize("rows", [5, 300])
def test_autotuning_offers_tiles_and_nothing_else(rows, monkeypatch):
    seen = []

    def first(name, choices, nodes, layout):
        seen.extend(choices)
        return choices[0].output_node()

    monkeypatch.setattr(matmul.compat, "select", first)
    tensors = [empty(rows, 4096), empty(1024, 4096, dtype=BF16)]
    generated_source(linear, tensors, max_autotune=True)
    assert len(seen) > 1
    tuning = r"(BLOCK_M|BLOCK_N|GROUP_M|num_stages|num_warps)=\d+"
    assert len({re.sub(tuning, "", choice.description) for choice in seen}) == 1


@pytest.mark.parametrize("rows", [17, 300])
def test_m_invariant_takes_the_arithmetic_of_decode_for_every_row(rows):
    def product(x, weight):
        return (torch.ops.heal.mm(x, weight.t(), "heal:::m_invariant"),)

    weight = empty(96, 1024, dtype=BF16)
    knobs = r"(A_PIECES|B_PIECES|BLOCK_K|CHUNK|SPLITS|FMA) : tl.constexpr = (\w+)"
    (few,) = templates(generated_source(product, [empty(8, 1024), weight]))
    (many,) = templates(generated_source(product, [empty(rows, 1024), weight]))
    assert sorted(re.findall(knobs, many)) == sorted(re.findall(knobs, few))
    assert ("PARTIALS : tl.constexpr = True" in few, "idx_s in range" in many) == (True, True)


@pytest.mark.parametrize("patches", [{"autotune": True}, {"strict": True}, {}])
def test_autotuning_is_off_unless_asked_for(patches, monkeypatch):
    offered = []

    def first(name, choices, nodes, layout):
        offered.append(len(choices))
        return choices[0].output_node()

    monkeypatch.setattr(matmul.compat, "select", first)
    tensors = [empty(300, 4096), empty(1024, 4096, dtype=BF16)]
    generated_source(linear, tensors, post_grad_custom_pre_pass=options(**patches))
    assert (offered[0] > 1) == ("autotune" in patches)


def test_an_old_gpu_runs_the_reference_and_says_so():
    tensors = [empty(40, 256), empty(96, 256)]
    with pytest.warns(selfcheck.TemplateWarning, match=r"7\.5 is below 8\.0"):
        source = generated_source(linear, tensors, Device(75))
    assert "torch.ops.heal.mm.default" in source


def test_a_template_that_failed_its_check_is_not_used(monkeypatch):
    monkeypatch.setattr(selfcheck, "broken", lambda template, _: template == "gemm")
    weight = empty(96, 256, dtype=BF16)
    assert "torch.ops.heal.mm.default" in generated_source(linear, [empty(40, 256), weight])
    assert templates(generated_source(linear, [empty(4, 256), weight]))


def test_strict_raises_where_a_template_failed_its_check(monkeypatch):
    monkeypatch.setattr(selfcheck, "broken", lambda template, _: template == "gemm")
    weight, strict = empty(96, 256, dtype=BF16), options(strict=True)
    with pytest.raises(InductorError, match="'gemm' failed its check on this GPU"):
        generated_source(linear, [empty(40, 256), weight], post_grad_custom_pre_pass=strict)
    few = generated_source(linear, [empty(4, 256), weight], post_grad_custom_pre_pass=strict)
    assert templates(few), "what passed is used"


def test_strict_raises_on_an_old_gpu():
    tensors = [empty(40, 256), empty(96, 256)]
    with pytest.raises(InductorError, match=r"7\.5 is below 8\.0"):
        generated_source(
            linear, tensors, Device(75), post_grad_custom_pre_pass=options(strict=True)
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_planes_come_by_tensor_descriptor_where_the_chip_has_them(capability, dynamic):
    tensors = [empty(2048, 4096), empty(4096, 4096, dtype=BF16)]
    source = generated_source(linear, tensors, Device(capability), dynamic=dynamic)
    (text,) = templates(source)
    assert text.count("tl.make_tensor_descriptor(") == (3 if capability >= 90 else 0)
    assert ("tl.load(A +" in text) == (capability < 90)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((4096, 4096), (4100, 1)), ((4096, 4095), (4096, 1)), ((4096, 4096), (0, 1))],
    ids=["stride not of 16 bytes", "size not of 16 bytes", "expanded"],
)
def test_what_a_descriptor_cannot_describe_is_loaded(shape, stride):
    weight = torch.empty_strided(shape, stride, dtype=FP16, device="meta")
    (text,) = templates(generated_source(linear, [empty(2048, shape[1]), weight]))
    assert "make_tensor_descriptor" not in text


@pytest.mark.parametrize("numerics", ["heal", "layercast"])
def test_routed_rows_have_a_template_and_ragged_sums_their_reference(numerics):
    def routed(x, experts, ends):
        return (torch.ops.heal.grouped_mm(x, experts.mT, ends, numerics),)

    def ragged(x, grad, ends):
        return (torch.ops.heal.grouped_mm(x.mT, grad, ends, numerics),)

    ends = empty(4, dtype=torch.int32)
    forward = generated_source(routed, [empty(64, 256), empty(4, 96, 256, dtype=BF16), ends])
    assert bool(templates(forward)) == (numerics == "heal")
    assert ("torch.ops.heal.grouped_mm.default(" in forward) == (numerics == "layercast")
    gradient = generated_source(ragged, [empty(64, 256), empty(64, 96), ends])
    assert "torch.ops.heal.grouped_mm.default(" in gradient


@pytest.mark.parametrize("stride", [(1, 600), (700, 1)])
def test_pieces_keep_the_stride_order_of_their_operand(stride):
    x = torch.empty_strided((512, 576), stride, device="meta")
    source = generated_source(linear, [x, empty(512, 576, dtype=BF16)])
    order = "(576, 1)" if stride[1] == 1 else "(1, 512)"
    assert source.count(f"empty_strided_cuda((512, 576), {order}, torch.float16)") == 2


def test_every_dot_names_its_precision_and_none_is_tf32():
    for name in matmul.kernels.GRIDS:
        text = matmul.kernels.source(name)
        assert text.count("tl.dot(") == text.count('input_precision="ieee"')
        assert "tf32" not in text.lower().replace("no tf32", "")


@pytest.mark.parametrize("capability", [100, 103, 120])
@pytest.mark.parametrize(("rows", "dot_rows"), [(4, "BLOCK_N"), (300, "BLOCK_M")])
def test_fp32_operands_stay_off_the_tensor_core_of_blackwell(rows, dot_rows, capability):
    """Fewer than the 64 rows of its instructions: Triton 3.6 would make a TF32 product of more."""

    def product(x, weight):
        return (torch.ops.heal.mm(x, weight.t(), "layercast"),)

    tensors = [empty(rows, 4096), empty(1024, 4096, dtype=BF16)]
    (text,) = templates(generated_source(product, tensors, Device(capability)))
    assert int(re.search(rf"{dot_rows} : tl.constexpr = (\d+)", text)[1]) < 64


@pytest.mark.parametrize("name", sorted(matmul.kernels.GRIDS))
def test_a_template_brings_the_functions_that_it_calls(name):
    text = matmul.kernels.source(name)
    called = set(re.findall(r"(heal_\w+)\(", text))
    assert called == set(re.findall(r"def (heal_\w+)\(", text))


@pytest.mark.parametrize("capability", [*tiles.SHARED_MEMORY, 999])
@pytest.mark.parametrize("planes", [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_tiles_fit_into_shared_memory(capability, planes):
    room = tiles.SHARED_MEMORY.get(capability, tiles.SMALLEST_SHARED_MEMORY) * 1024
    for m, n in ((1, 1), (100, 3000), (4096, 4096)):
        for cut in (False, True):
            found = tiles.gemm_tiles(capability, m, n, planes, matmul.BLOCK_K, cut=cut)
            assert found
            assert all(tile.gemm_bytes(matmul.BLOCK_K, *planes) <= room for tile in found)


def test_fake_cuda_leaves_no_trace():
    before = torch.cuda.is_available(), torch.version.cuda
    generated_source(linear, [empty(4, 128), empty(96, 128, dtype=BF16)])
    assert (torch.cuda.is_available(), torch.version.cuda) == before
    assert torch.cuda.get_device_capability is not always
