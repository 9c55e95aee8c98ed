"""Several processes: DDP and FSDP2 compiled per block, and tensor-parallel layers."""

import pytest
import torch

from tests.support.against_torch import U
from tests.support.bits import differing
from tests.support.finetuning import in_fp64
from tests.support.ranks import (
    ROWS,
    compile_blocks,
    data_parallel,
    four_heads,
    gradients,
    logits_and_gradients,
    on_ranks,
    sum_with_a_nan,
    tensor_parallel,
)
from tests.support.tiny_llama import make_llama


@pytest.fixture(autouse=True)
def no_gradients():
    """The folder's tests run without gradients; these train."""
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def references():
    """Gradients of one process, in FP32 and in FP64."""
    with torch.enable_grad():
        wide = make_llama(torch.float32)
        exact = gradients(in_fp64(wide), ROWS)
        return gradients(wide, ROWS), exact


def worst(found, references):
    """Largest observed/bound over the parameters: `2 |fp32 - fp64| + 4u |fp64|`, maximum norm."""
    fp32, exact = references
    assert found.keys() == exact.keys()
    ratios = []
    for name, truth in exact.items():
        bound = 2 * (fp32[name] - truth).abs().max() + 4 * U * truth.abs().max()
        ratios.append(float((found[name] - truth).abs().max() / bound))
    return max(ratios)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "checkpoint"])
def test_two_ranks_are_as_near_fp64_as_one_process(how, references, tmp_path):
    first, second = on_ranks(2, tmp_path, data_parallel, how, None)
    assert differing(first, second) == 0, "the ranks agree"
    ratio = worst(first, references)
    print(f"{how}: observed/bound {ratio:.3f}")
    assert ratio <= 1


@pytest.mark.deep
@pytest.mark.parametrize("how", ["ddp", "fsdp", "checkpoint"])
def test_two_ranks_compiled_by_inductor(how, references, tmp_path):
    ratio = worst(on_ranks(2, tmp_path, data_parallel, how, "heal")[0], references)
    print(f"{how}: observed/bound {ratio:.3f}")
    assert ratio <= 1


def test_one_process_compiled_per_block(references):
    model = make_llama(torch.float32)
    compile_blocks(model)
    ratio = worst(gradients(model, ROWS), references)
    print(f"one process: observed/bound {ratio:.3f}")
    assert ratio <= 1


def test_bf16_is_not_as_near(references):
    """The inverse."""
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(make_llama(torch.float32), ROWS)
    assert worst(found, references) > 1


# --------------------------------------------------------------------------- tensor parallel


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_exact_has_the_bits_of_one_process(ranks, tmp_path):
    """Logits and the gradients of every parameter, on every rank."""
    alone = logits_and_gradients(four_heads(), "exact")
    torch._dynamo.reset()
    for found in on_ranks(ranks, tmp_path, tensor_parallel, "exact"):
        assert found.keys() == alone.keys()
        assert differing(found["logits"], alone["logits"]) == 0
        assert differing(found, alone) == 0


def test_tensor_parallel_bf16_and_heal_do_not(tmp_path):
    """The inverse. heal differs in last bits only, with `kv="int24"`."""
    found = {}
    for precision in ("bf16", "heal"):
        torch._dynamo.reset()
        alone = logits_and_gradients(four_heads(), precision)["logits"]
        ranks = on_ranks(2, tmp_path / precision, tensor_parallel, precision)
        found[precision] = float((ranks[0]["logits"] - alone).abs().max())
    print(found)
    assert found["heal"] > 0
    assert found["heal"] * 2**8 < found["bf16"], "a rounding to BF16 is 2**16 roundings to FP32"


def test_a_nan_on_one_rank_is_seen_by_all(tmp_path):
    """Its row is NaN everywhere, although a MAX over ranks need not hand a NaN on."""
    for found in on_ranks(2, tmp_path, sum_with_a_nan):
        assert found["product"][0].isnan().all()
        assert torch.equal(found["product"][1], torch.full((4,), 6.0))
