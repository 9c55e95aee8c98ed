"""Tiny random language models, and SmolLM2 where a test asks for it."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def make_llama(dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES | {"eos_token_id": None, "pad_token_id": 0} | changes
    )
    # The usual 0.02 gives logits without a clear winner, and greedy text that ends in ties.
    config.initializer_range = 0.2
    return transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture
def llama_fp32():
    """The model of `llama` with the same BF16-rounded weights, in FP32."""
    model = make_llama()
    wide = make_llama(torch.float32)
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return wide


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
