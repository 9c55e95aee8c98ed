"""SmolLM2-135M-Instruct itself: its checkpoint, and greedy text under HEAL and in FP32."""

import pytest
import torch

from healpass.integrations import smollm2
from healpass.integrations.transformers import heal_model
from tests.support.examples import load_example

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def demo():
    return load_example("generate_reproducibly")


def answers(model, tokenizer, texts, new_tokens, **arguments):
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=new_tokens, **arguments)
    return tokens[:, batch["input_ids"].shape[1] :].tolist()


def test_the_checkpoint_is_bf16_and_its_rotary_frequencies_are_not_rounded():
    narrow, tokenizer = smollm2.load(torch.bfloat16)
    wide, _ = smollm2.load(torch.float32)
    for name, value in narrow.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value.float(), wide.state_dict()[name])
    assert narrow.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(narrow.model.rotary_emb.inv_freq, wide.model.rotary_emb.inv_freq)
    assert tokenizer.padding_side == "left"
    assert len(narrow.model.layers) == 30


def test_a_short_model_is_the_first_part_of_the_whole():
    whole, _ = smollm2.load()
    short, _ = smollm2.load(layers=2, vocabulary=500)
    assert len(short.model.layers) == short.config.num_hidden_layers == 2
    assert whole.config.num_hidden_layers == 30
    assert torch.equal(short.lm_head.weight, whole.lm_head.weight[:500])
    kept = short.model.state_dict()
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in kept.items())


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.deep)])
def test_two_layers_give_the_fp32_models_text_in_a_padded_batch(demo, cache):
    narrow, tokenizer = smollm2.load(torch.bfloat16, layers=2)
    wide, _ = smollm2.load(torch.float32, layers=2)
    texts = [demo.chat(tokenizer, prompt) for prompt in demo.PROMPTS]
    expected = answers(wide, tokenizer, texts, 16)
    healed = heal_model(narrow, kv="int24")
    found = answers(healed, tokenizer, texts, 16, cache_implementation=cache)
    assert found == expected


@pytest.mark.deep
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_whole_model_gives_the_fp32_models_text(demo, cache):
    narrow, tokenizer = smollm2.load(torch.bfloat16)
    wide, _ = smollm2.load(torch.float32)
    texts = [demo.chat(tokenizer, prompt) for prompt in demo.PROMPTS]
    expected = answers(wide, tokenizer, texts, 48)
    found = answers(
        heal_model(narrow, kv="int24"), tokenizer, texts, 48, cache_implementation=cache
    )
    assert found == expected


def test_plain_bf16_does_not_give_it(demo):
    """The inverse: without HEAL, the same comparison fails."""
    narrow, tokenizer = smollm2.load(torch.bfloat16, layers=2)
    wide, _ = smollm2.load(torch.float32, layers=2)
    texts = [demo.chat(tokenizer, prompt) for prompt in demo.PROMPTS]
    expected = answers(wide, tokenizer, texts, 16)
    assert answers(narrow, tokenizer, texts, 16) != expected
