"""What the CUDA lowering of attention decides: families, fusion, fallbacks. Fake CUDA, no GPU."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import InductorError

from healpass.cache_key import CacheKey
from healpass.config import HealConfig
from healpass.lowering.cuda import attention, attention_gradients, selfcheck, tiles
from tests.support.attention_cases import AttentionCase, Scoring
from tests.support.fake_cuda import Device, Kernel, generated_source, kernels

NUMERICS = (
    "Q_DIGITS", "K_DIGITS", "V_DIGITS", "BLOCK_N", "CHUNK", "CAUSAL", "SCALE", "WINDOW", "SOFTCAP",
)  # fmt: skip


def knobs(kernel: Kernel, names: tuple[str, ...] = NUMERICS) -> dict[str, str]:
    return dict(re.findall(rf"({'|'.join(names)}) : tl.constexpr = (\S+)", kernel.source))


@pytest.mark.parametrize(("length", "names"), [(1, 2), (4, 2), (5, 1), (200, 1)])
def test_the_family_follows_from_the_rows_of_a_key_head(length, names):
    """32 query heads on 8 key heads: 4 rows per query."""
    found = AttentionCase("case", length, 1000).templates()
    assert len(found) == names
    assert knobs(found[0])["CHUNK"] == (str(attention.CHUNK) if names == 2 else "0")


@pytest.mark.parametrize("kv", ["int16", "int24", "fp32"])
@pytest.mark.parametrize("length", [1, 200])
@pytest.mark.parametrize("generation", [(80, 86, 89), (90, 100, 120)])
def test_numerics_knobs_depend_on_the_generation_and_not_on_batch_or_length(
    generation, length, kv
):
    found = set()
    for capability in generation:
        for batch, keys in ((1, 1000), (7, 3000)):
            case = AttentionCase("case", length, keys, batch=batch, kv=kv)
            found.add(str(knobs(case.templates(capability)[0])))
    assert len(found) == 1


@pytest.mark.parametrize("generation", [(80, 86, 89), (90, 100, 120)])
def test_backward_numerics_depend_on_the_generation_only(generation):
    found = set()
    for capability in generation:
        query, key = AttentionCase("case", 200, 300, backward=True).templates(capability)
        blocks = (knobs(query, ("BLOCK_N",)), knobs(key, ("BLOCK_M",)))
        found.add(str((knobs(query) | {"BLOCK_M": ""}, blocks)))
    assert len(found) == 1


@pytest.mark.parametrize("length", [1, 200])
@pytest.mark.parametrize("kv", ["int16", "fp32"])
def test_nothing_is_as_large_as_a_score_matrix(length, kv):
    """Beside the results, prefill needs one number per row and decode its chunks' parts."""
    case = AttentionCase("case", length, 4096, kv=kv)
    source = generated_source(case, case.tensors())
    sizes = [eval(size) for size in re.findall(r"empty_strided_cuda\((\(.*?\)), \(", source)]
    largest = max(torch.Size(size).numel() for size in sizes)
    rows, chunks = 32 * length, 4096 // attention.CHUNK
    assert largest == rows * 128 * (chunks if length == 1 else 1)


def test_grouped_heads_are_not_repeated():
    case = AttentionCase("case", 200, 300)
    assert len(kernels(generated_source(case, case.tensors()))) == 1


def test_what_follows_joins_the_kernel():
    case = AttentionCase("case", 200, 300)

    def layer(*tensors: Tensor) -> tuple[Tensor]:
        return (torch.relu(case(*tensors)[0]).to(torch.bfloat16),)

    (only,) = kernels(generated_source(layer, case.tensors()))
    assert only.is_template
    assert "'out_ptr1': '*bf16'" in only.source
    # From torch 2.15 on it is Triton's own.
    assert re.search(r"(triton_helpers|tl)\.maximum\(tmp\d+, accumulator\b", only.source)


def test_no_kernel_uses_atomics():
    for backward in (False, True):
        for kernel in AttentionCase("case", 200, 300, backward=backward).templates():
            assert "atomic" not in kernel.source


@pytest.mark.parametrize("kv", ["int16", "fp32"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 288}, "not fixed numbers from 1 to 256"),
        ({"scoring": Scoring(numerics="layercast")}, "layercast multiplies in FP32"),
    ],
)
def test_what_has_no_kernel_runs_its_reference_and_says_so(changes, reason, kv):
    case = AttentionCase("case", 20, 30, kv=kv, **changes)
    with pytest.warns(selfcheck.TemplateWarning, match=reason):
        source = generated_source(case, case.tensors())
    assert "attention.default" in source


def test_an_old_gpu_runs_the_reference_and_says_so():
    case = AttentionCase("case", 20, 30)
    with pytest.warns(selfcheck.TemplateWarning, match=r"7\.5 is below 8\.0"):
        source = generated_source(case, case.tensors(), Device(75))
    assert "torch.ops.heal.integer_attention.default" in source


@pytest.mark.parametrize("name", ["attention", "attention_backward_key"])
def test_a_template_that_failed_its_check_is_not_used(name, monkeypatch):
    monkeypatch.setattr(selfcheck, "broken", lambda template, _: template == name)
    case = AttentionCase("case", 20, 30, backward="backward" in name)
    source = generated_source(case, case.tensors())
    assert not [kernel for kernel in kernels(source) if kernel.is_template]


@pytest.mark.parametrize("name", ["attention", "attention_backward_key"])
def test_strict_raises_where_a_template_failed_its_check(name, monkeypatch):
    monkeypatch.setattr(selfcheck, "broken", lambda template, _: template == name)
    case = AttentionCase("case", 20, 30, backward="backward" in name)
    strict = CacheKey(HealConfig(strict=True))
    with pytest.raises(InductorError, match=f"'{name}' failed its check on this GPU"):
        generated_source(case, case.tensors(), post_grad_custom_pre_pass=strict)
    monkeypatch.setattr(selfcheck, "broken", lambda *_: False)
    source = generated_source(case, case.tensors(), post_grad_custom_pre_pass=strict)
    assert [kernel for kernel in kernels(source) if kernel.is_template], "what passed is used"


def test_strict_raises_on_an_old_gpu():
    case = AttentionCase("case", 20, 30)
    strict = CacheKey(HealConfig(strict=True))
    with pytest.raises(InductorError, match=r"7\.5 is below 8\.0"):
        generated_source(case, case.tensors(), Device(75), post_grad_custom_pre_pass=strict)


def test_autotuning_offers_tiles_and_nothing_else(monkeypatch):
    seen = []

    def first(name, choices, nodes, layout):
        seen.extend(choices)
        return choices[0].output_node()

    monkeypatch.setattr(attention.compat, "select", first)
    case = AttentionCase("case", 200, 300)
    generated_source(case, case.tensors(), max_autotune=True)
    assert len(seen) > 1
    tuning = r"(BLOCK_M|num_stages|num_warps)=\d+"
    assert len({re.sub(tuning, "", choice.description) for choice in seen}) == 1


@pytest.mark.parametrize("head_block", [32, 64, 128, 256])
@pytest.mark.parametrize("digits", [0, 2, 3])
@pytest.mark.parametrize("chain", [32, 64])
def test_blocks_are_deep_enough_for_the_tensor_core_and_one_chain(head_block, digits, chain):
    for block in (
        attention.keys_per_block(head_block, digits, chain),
        attention_gradients.block_of(head_block, digits),
    ):
        assert 16 <= block <= chain
        assert attention.CHUNK % block == 0


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_gpu_has_a_tile_for_every_problem(capability):
    for head_block in (32, 64, 128, 256):
        for digits in (0, 2, 3):
            assert all(tiles.attention_backward_tiles(capability, head_block, digits))
            for decodes in (False, True):
                assert tiles.attention_tiles(capability, head_block, digits, decodes)


@pytest.mark.parametrize("kv", ["int16", "int24", "fp32"])
@pytest.mark.parametrize("length", [1, 200])
def test_scaled_dot_product_attention_has_kernels_alone(length, kv):
    """Digits and scales are written by Inductor's own kernels; no operator is called."""

    def layer(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        rope = torch.cos(query) * query
        return (torch.ops.heal.sdpa(rope, key, value, is_causal=True, enable_gqa=True, kv=kv),)

    shapes = ((1, 32, length, 128), (1, 8, 300, 128), (1, 8, 300, 128))
    source = generated_source(layer, [torch.empty(shape, device="meta") for shape in shapes])
    found = kernels(source)
    assert "torch.ops" not in source[source.index("def call(") :]
    assert sum(kernel.is_template for kernel in found) == (2 if length == 1 else 1)
    producer = next(kernel for kernel in found if "cos" in kernel.source)
    assert ("int8" in producer.source) == (kv != "fp32")
