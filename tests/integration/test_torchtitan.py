"""torchtitan's order of things: activation checkpointing, then every block compiled by itself.

torchtitan's own code runs where it is installed (`make test-torchtitan` puts it there): its
Llama 3, its checkpointing, its `apply_compile`. Its requirements exclude those of this package.
"""

import copy

import pytest
import torch

from healpass import HealConfig
from tests.support.against_torch import U
from tests.support.ranks import ROWS, checkpointed, compile_blocks, gradients, plain_name
from tests.support.rewriting import Rewritten
from tests.support.tiny_llama import make_llama

OPTIONS = HealConfig(kv="int24", outputs="fp32")


@pytest.fixture(autouse=True)
def no_gradients():
    """The folder's tests run without gradients; these train."""
    with torch.enable_grad():
        yield


def worst(found, fp32, exact):
    """Largest observed/bound over the parameters: `2 |fp32 - fp64| + 4u |fp64|`, maximum norm."""
    ratios = []
    for name, truth in exact.items():
        bound = 2 * (fp32[name] - truth).abs().max() + 4 * U * truth.abs().max()
        ratios.append(float((found[name] - truth).abs().max() / bound))
    return max(ratios)


def test_a_checkpointed_block_has_the_gradients_of_one_that_is_not():
    """Computed again, an activation has the bits that it had."""
    plain, model = make_llama(torch.float32), make_llama(torch.float32)
    compile_blocks(plain)
    expected = gradients(plain, ROWS)
    torch._dynamo.reset()
    checkpointed(model)
    compile_blocks(model)
    found = gradients(model, ROWS)
    assert not found.keys() <= expected.keys(), "the blocks are wrapped"
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[plain_name(name)])


# --------------------------------------------------------------------------- torchtitan itself


class OneProcess:
    """The dimensions of parallelism where there are none."""

    tp_enabled = False


@pytest.fixture(scope="module")
def llama3():
    """torchtitan's debug model, cut to two blocks.

    Its FlexAttention has no backward on CPU, in torch; its SDPA module takes that place.
    """
    pytest.importorskip("torchtitan")
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry

    config = model_registry("debugmodel", attn_backend="flex").model
    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    torch.manual_seed(0)
    model = config.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def llama3_gradients(model):
    rows = torch.arange(32).reshape(2, 16) * 7 % 2000
    out = model(rows, positions=torch.arange(16).expand(2, 16))
    torch.nn.functional.cross_entropy(out.flatten(0, 1), rows.flatten()).backward()
    return {plain_name(name): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("policy", [None, "FullAC", "SelectiveAC"])
def test_llama3_of_torchtitan_compiled_by_its_own_function(llama3, policy):
    from torchtitan.config import CompileConfig
    from torchtitan.distributed import activation_checkpoint
    from torchtitan.distributed.compile import apply_compile

    plain, model = copy.deepcopy(llama3), copy.deepcopy(llama3)
    expected = llama3_gradients(plain)
    if policy is not None:
        getattr(activation_checkpoint, policy).Config().build(dump_folder="").apply(model)
    compiler = Rewritten(model, OPTIONS, aot=True)
    compile_config = CompileConfig(enable=True, backend=compiler._backend)
    apply_compile(model, compile_config=compile_config, parallel_dims=OneProcess())
    found = llama3_gradients(model)
    assert len(compiler.graphs) == 1, "one compilation serves all blocks"
    assert not compiler.kept
    assert {node.op for node in compiler.nodes} == {"linear", "scaled_dot_product_attention"}
    ratio = worst(found, expected, llama3_gradients(copy.deepcopy(llama3).double()))
    print(f"{policy}: observed/bound {ratio:.3f}")
    assert ratio <= 1


def test_flex_attention_is_refused_by_torchtitan_for_every_backend_but_inductor(llama3):
    from torchtitan.config import CompileConfig
    from torchtitan.distributed.compile import apply_compile
    from torchtitan.models.llama3 import model_registry

    config = model_registry("debugmodel", attn_backend="flex").model
    config.layers = config.layers[:1]
    with pytest.raises(ValueError, match="Model uses FlexAttention but compile backend 'heal'"):
        apply_compile(
            config.build(),
            compile_config=CompileConfig(enable=True, backend="heal"),
            parallel_dims=OneProcess(),
        )
