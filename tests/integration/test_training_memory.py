"""What a training step holds between forward and backward: heal against FP32 activations.

Counted are the tensors that autograd saves, and the weights. Both models go through AOTAutograd
and its partitioner, which decides what is saved and what is computed again, as in Inductor.
"""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager_decomp_partition

from healpass import HealConfig
from healpass.graph.pipeline import rewrite
from healpass.integrations.transformers import register
from tests.support.tiny_llama import make_llama

#: Long rows of a wide model, so that activations are more than what is counted once per row.
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 300}
ROWS = torch.arange(4 * 64).reshape(4, 64) % 250 + 1


@pytest.fixture(autouse=True)
def no_gradients():
    """The folder's tests run without gradients; this trains."""
    with torch.enable_grad():
        yield


def saved(model, backend):
    """Bytes by shape and dtype that autograd holds after the forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            name = f"{tuple(tensor.shape)} {tensor.dtype}"
            held[storage.data_ptr()] = (name, storage.nbytes(), tensor)  # kept alive: own address
        return tensor

    model.compile(backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ROWS, labels=ROWS, use_cache=False).loss
    totals = {}
    for name, size, _ in held.values():
        totals[name] = totals.get(name, 0) + size
    loss.backward()
    return totals


def weight_bytes(model):
    return sum(p.nbytes for p in model.parameters())


def heal(graph_module, example_inputs):
    """A backend: HEAL's rewrite, then AOTAutograd and its partitioner."""
    rewrite(graph_module, HealConfig(outputs="fp32"))
    return aot_eager_decomp_partition(graph_module, example_inputs)


def test_a_step_holds_little_more_than_bf16_weights_and_fp32_activations():
    register()
    model = make_llama(**SHAPE).train()
    model.set_attn_implementation("heal")
    weights, ours = weight_bytes(model), saved(model, heal)
    torch._dynamo.reset()
    wide = make_llama(torch.float32, **SHAPE).train()
    theirs = saved(wide, aot_eager_decomp_partition)
    for name, totals in (("heal", ours), ("FP32", theirs)):
        largest = sorted(totals.items(), key=lambda item: -item[1])[:6]
        print(
            name, sum(totals.values()), *(f"{what}: {size}" for what, size in largest), sep="\n  "
        )
    # A tenth more: a scale and a logsumexp for each row of a head, which has 16 elements.
    bound = 1.1 * (weights + sum(theirs.values()))
    found = weights + sum(ours.values())
    print(f"{found} bytes held, observed/bound {found / bound:.3f}")
    assert found <= bound
    torch._dynamo.reset()
    uncompiled = saved(make_llama(torch.float32, **SHAPE).train(), "eager")
    assert weights + sum(uncompiled.values()) > bound, "the inverse: what torch saves by itself"
