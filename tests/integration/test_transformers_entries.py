"""Every way into a model is compiled: what generate, pipelines and users call besides it."""

import copy
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers as hf
from torch import nn

import healpass.integrations.transformers as integration
from healpass.errors import ConfigError
from healpass.integrations.entries import is_entry, methods_of
from healpass.integrations.transformers import entries, heal_model, unheal_model
from tests.support.entering import interpreted

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64, "eos_token_id": 60,
    "bos_token_id": 1, "projection_dim": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
IDS = torch.tensor([[5, 17, 33, 8, 60]])
TWO = {
    "max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True,
    "output_logits": True,
}  # fmt: skip
GOLDEN = Path(__file__).parents[1] / "golden" / "methods_not_compiled.expected"


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2,
                    decoder_start_token_id=0, pad_token_id=0, eos_token_id=None, dropout_rate=0.0)
    )  # fmt: skip


def whisper():
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1,
                         encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
                         decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
                         max_target_positions=30, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                         decoder_start_token_id=1, suppress_tokens=None,
                         begin_suppress_tokens=None)
    )  # fmt: skip


def clip():
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32))


def logits_of(found):
    return torch.stack(found.logits)


CALLS = {
    "T5's generate": (t5, lambda m: logits_of(m.generate(IDS, **TWO))),
    "T5's generate with beams": (
        t5,
        lambda m: logits_of(m.generate(IDS, **TWO, num_beams=2, cache_implementation="static")),
    ),
    "T5's get_encoder": (t5, lambda m: m.get_encoder()(IDS).last_hidden_state),
    "Whisper's generate": (
        whisper,
        lambda m: logits_of(m.generate(input_features=noise(1, 8, 40).to(m.dtype), **TWO)),
    ),
    "CLIP's get_image_features": (
        clip,
        lambda m: m.get_image_features(noise(1, 3, 16, 16).to(m.dtype)).pooler_output,
    ),
    "CLIP's get_text_features": (clip, lambda m: m.get_text_features(IDS).pooler_output),
    "CLIP's towers by hand": (
        clip,
        lambda m: m.visual_projection(
            m.vision_model(pixel_values=noise(1, 3, 16, 16).to(m.dtype)).pooler_output
        ),
    ),
}


def models(make):
    """A random BF16 model, and the same weights in FP64, FP32 and BF16 without HEAL."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.bfloat16()
    return (
        model, copy.deepcopy(model).double(), copy.deepcopy(model).float(), copy.deepcopy(model),
    )  # fmt: skip


def errors(make, call):
    """Errors of the healed model, of FP32 and of BF16, against FP64."""
    ours, exact, single, half = models(make)
    truth = call(exact)
    heal_model(ours, kv="fp32")
    return [float((call(x).double() - truth).norm()) for x in (ours, single, half)]


@pytest.mark.parametrize("name", CALLS)
def test_what_generate_and_users_call_is_as_accurate_as_fp32(name):
    """Within twice FP32's error, as whole models are; plain BF16 is a thousand times as far."""
    with interpreted():
        ours, single, half = errors(*CALLS[name])
    print(f"{name}: {ours / single:.2f} of FP32's error, BF16 {half / single:.0f}")
    assert ours <= 2 * single
    assert half > 1000 * single


@pytest.mark.parametrize("name", ["T5's generate", "CLIP's get_image_features"])
def test_compiling_the_models_call_alone_is_not_enough(name):
    """The inverse: without the other entries the same calls round."""
    alone = mock.patch.object(integration, "modules_of", lambda model: [("", model)])
    methods = mock.patch.object(integration, "methods_of", return_value=[])
    with interpreted(), alone, methods:
        ours, single, _ = errors(*CALLS[name])
    assert ours > 100 * single


def test_an_entry_inside_another_is_inlined():
    model, *_ = models(t5)
    with interpreted() as graphs:
        heal_model(model)(input_ids=IDS, decoder_input_ids=IDS, use_cache=False)
        assert len(graphs) == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        model.get_encoder()(IDS)
        assert len(graphs) == 2


def test_hidden_states_do_not_break_the_graph(llama):
    """transformers installs hooks at the first call that wants them; that must not be traced."""
    with interpreted() as graphs:
        found = heal_model(llama)(IDS, output_hidden_states=True, use_cache=False)
    assert len(graphs) == 1
    assert len(found.hidden_states) == llama.config.num_hidden_layers + 1


def test_the_entries_are_listed(llama):
    assert entries(llama) == []
    assert entries(heal_model(llama)) == [
        "LlamaForCausalLM", "model", "model.embed_tokens", "model.norm", "lm_head",
    ]  # fmt: skip
    model, *_ = models(clip)
    found = entries(heal_model(model))
    assert {"CLIPModel", "vision_model", "visual_projection", "get_image_features"} <= {*found}
    with pytest.raises(ConfigError, match="needs a transformers PreTrainedModel"):
        entries(nn.Linear(2, 2))


def test_entries_keep_the_signature_of_what_they_stand_for():
    """generate reads it, to decide which arguments an encoder takes."""
    model, plain, *_ = models(clip)
    heal_model(model)
    for name in ("get_image_features", "forward"):
        ours, theirs = (inspect.signature(getattr(x, name)) for x in (model, plain))
        assert ours == theirs


# ------------------------------------------------------------------------- transformers' classes


def classes_of_models():
    """Every PreTrainedModel that transformers' model files define."""
    found = {}
    for _, path, package in pkgutil.iter_modules(hf.models.__path__, "transformers.models."):
        folder = Path(hf.models.__path__[0]) / path.rpartition(".")[2]
        for file in sorted(folder.glob("modeling_*.py")) if package else ():
            try:
                module = importlib.import_module(f"{path}.{file.stem}")
            except ImportError:  # a model of another framework or package
                continue
            found |= {
                f"{kind.__module__}.{name}": kind
                for name, kind in vars(module).items()
                if isinstance(kind, type) and issubclass(kind, hf.PreTrainedModel)
            }
    return list(found.values())


def test_every_public_method_of_transformers_models_is_an_entry_or_listed():
    """A new one must be looked at: does it compute with weights, outside forward?"""
    kinds = [kind for kind in classes_of_models() if ".models." in kind.__module__]
    assert len(kinds) > 1000
    common = {*dir(hf.PreTrainedModel), *dir(hf.GenerationMixin)}
    others, covered = set(), set()
    for kind in kinds:
        for name, value in vars(kind).items():
            if name.startswith("_") or name == "forward" or not inspect.isfunction(value):
                continue
            if is_entry(kind, name):
                covered.add(name)
            elif name not in common or name == "generate":
                others.add(name)
    listed = {line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")}
    assert {"get_image_features", "get_text_features", "encode", "decode"} <= covered
    # Other versions of transformers have fewer: a name that is gone is no fault.
    assert sorted(others - covered - listed) == []
    assert not listed & covered


def test_the_walk_finds_a_method_that_is_not_covered():
    class Sub(hf.CLIPModel):
        def get_sound_features(self, sound):
            return sound

        def listen(self, sound):
            return sound

    assert "get_sound_features" in methods_of(Sub)
    assert "listen" not in methods_of(Sub)


# ---------------------------------------------------------------------------------- other owners


class Sentences(nn.Sequential):
    """As SentenceTransformer: `encode` calls its modules one by one."""

    def encode(self, ids):
        states = self[0].auto_model(ids).last_hidden_state.mean(1)
        return self[1](states)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.auto_model = model


def bert():
    return hf.BertModel(hf.BertConfig(**TEXT, hidden_dropout_prob=0.0))


def test_a_sentence_transformer_is_healed_as_it_is(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Sentences)
    )
    with interpreted():
        ours, single, half = errors(
            lambda: Sentences(Wrapper(bert()), nn.Linear(32, 16)), lambda m: m.encode(IDS)
        )
    print(f"{ours / single:.2f} of FP32's error")
    assert half > 1000 * single
    with pytest.raises(ConfigError, match="without a model of transformers"):
        heal_model(Sentences(nn.Linear(2, 2)))
    plain = Sentences(Wrapper(bert()), nn.Linear(32, 16)).eval()
    expected = plain.encode(IDS)
    with interpreted() as graphs:
        assert torch.equal(unheal_model(heal_model(plain)).encode(IDS), expected)
    assert not graphs
