"""Tiny random language models, and SmolLM2 where a test asks for it."""

import pytest
import torch

pytest.importorskip("transformers")
from tests.support.tiny_llama import make_llama


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


@pytest.fixture
def accelerate():
    """The package, without what an earlier test (a Trainer makes one) left in its shared state."""
    package = pytest.importorskip("accelerate")
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield package
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
