"""Frequencies of rotary embeddings have the same bits on every machine under `exact`."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf

from healpass.integrations.frequencies import PinnedFunctions, pin
from healpass.integrations.transformers import heal_model, unheal_model

SIZES = {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 128,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
#: Of each kind that transformers has, with the base at which torch's two powers differ here.
ROPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {"factor": 8.0} | LLAMA3,
    "longrope": {
        "short_factor": [1.0 + i / 64 for i in range(64)],
        "long_factor": [2.0 + i / 64 for i in range(64)],
        "original_max_position_embeddings": 64,
    },
}
#: What another process prints: the bits of the frequencies, plain and pinned.
PROGRAM = "import json, tests.unit.test_frequencies as t; print(json.dumps(t.all_bits()))"


def made(kind="default"):
    rope = {"rope_type": kind, "rope_theta": 1e6} | ROPES[kind]
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_parameters=rope)).eval()


def bits(model):
    return model.model.rotary_emb.inv_freq.view(torch.int32).tolist()


def all_bits():
    """For each kind, the frequencies as torch makes them and as `exact` has them."""
    return {k: [bits(made(k)), bits(heal_model(made(k), precision="exact"))] for k in ROPES}


@pytest.fixture(scope="module")
def elsewhere():
    """`all_bits()` in a process without vector instructions."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout)


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_are_those_of_another_instruction_set(elsewhere, kind):
    assert all_bits()[kind][1] == elsewhere[kind][1]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="this processor has one power only",
)
def test_without_the_pin_they_differ(elsewhere):
    """The inverse: the models as torch makes them."""
    here = all_bits()
    assert any(here[kind][0] != elsewhere[kind][0] for kind in ROPES)


def test_unheal_model_puts_the_old_ones_back():
    model = made()
    buffers = model.model.rotary_emb
    given = buffers.inv_freq.clone()
    given[3] = torch.nextafter(given[3], torch.tensor(0.0))  # as another processor may have it
    buffers.inv_freq.copy_(given)
    heal_model(model, precision="exact")
    copied = copy.deepcopy(model)
    assert not torch.equal(buffers.inv_freq, given)
    assert torch.equal(unheal_model(model).model.rotary_emb.inv_freq, given)
    assert not torch.equal(copied.model.rotary_emb.inv_freq, given)
    assert torch.equal(unheal_model(copied).model.rotary_emb.inv_freq, given)


def test_other_precisions_leave_them():
    model = made()
    before = model.model.rotary_emb.inv_freq
    assert heal_model(model, precision="heal").model.rotary_emb.inv_freq is before


def test_somebodys_choice_stays_and_is_said():
    model = made()
    with torch.no_grad():
        model.model.rotary_emb.inv_freq[3] *= 1.001
    chosen = model.model.rotary_emb.inv_freq.clone()
    with pytest.warns(UserWarning, match=r"rotary_emb\.inv_freq: it was changed"):
        heal_model(model, precision="exact")
    assert torch.equal(model.model.rotary_emb.inv_freq, chosen)


def test_a_module_without_a_configuration_is_said():
    module = torch.nn.Module()
    module.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8))
    replaced, kept = pin(module)
    assert not replaced
    assert kept == {"inv_freq": "Module has no configuration to be made of"}


def test_rounded_frequencies_stay_rounded():
    """`model.to(bfloat16)` rounds them; what it rounds is pinned."""
    model = made().to(torch.bfloat16)
    pinned = heal_model(made(), precision="exact").model.rotary_emb.inv_freq
    found = heal_model(model, precision="exact").model.rotary_emb.inv_freq
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, pinned.to(torch.bfloat16))


def test_functions_that_are_pinned():
    x = torch.linspace(0.1, 3.0, 7)
    with PinnedFunctions():
        found = (3.0**x, x**2.5, x**x, x.cos(), x.sin(), x.log(), x.exp(), 1.0 / x)
        outer = torch.einsum("i,j->ij", x, x)
    heal = torch.ops.heal
    expected = (
        heal.pow(torch.tensor(3.0), x), heal.pow_scalar(x, 2.5), heal.pow(x, x), heal.cos(x),
        heal.sin(x), heal.log(x), heal.exp(x), heal.reciprocal(x),
    )  # fmt: skip
    assert all(map(torch.equal, found, expected))
    assert torch.equal(outer, x[:, None] * x)
