"""heal_model: stays a PreTrainedModel, compiles what generate runs, and gives it an FP32 cache."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)

from healpass.config import HealConfig
from healpass.errors import CacheError, ConfigError
from healpass.integrations.transformers import RECORD, HealCache, heal_model

PROMPTS = torch.tensor([[0, 0, 0, 5, 9], [11, 3, 7, 8, 2], [0, 4, 6, 20, 31]])
MASK = (PROMPTS != 0).long()
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def answer(model, rows, **arguments):
    """New tokens of some prompts, in one batch with left padding."""
    batch = {"input_ids": PROMPTS[rows], "attention_mask": MASK[rows]}
    return model.generate(**batch, **GREEDY, **arguments)[:, PROMPTS.shape[1] :]


@pytest.fixture
def seen(monkeypatch):
    """The caches that generate used, by watching what heal_model's hook made."""
    caches = []
    update = HealCache.update

    def watch(self, *args, **kwargs):
        if not caches or caches[-1] is not self:
            caches.append(self)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(HealCache, "update", watch)
    return caches


def test_greedy_text_is_that_of_the_fp32_model_in_any_batch_and_cache(llama, llama_fp32):
    expected = answer(llama_fp32, [0, 1, 2])
    healed = heal_model(llama, kv="int24")
    assert healed is llama
    assert isinstance(healed, PreTrainedModel)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not compiled")
        assert torch.equal(answer(healed, [0, 1, 2]), expected)
        assert torch.equal(answer(healed, [2, 0]), expected[[2, 0]])
        static = answer(healed, [0, 1, 2], cache_implementation="static")
        assert torch.equal(static, expected)
    assert not counters["graph_break"]


def test_options_are_keywords_a_mapping_or_a_configuration(llama):
    fields = {"precision": "exact", "kv": "int24"}
    for call in (
        lambda: heal_model(llama, **fields),
        lambda: heal_model(llama, fields),
        lambda: heal_model(llama, HealConfig(**fields)),
    ):
        found = {entry.config for entry in vars(call())[RECORD].entries.values()}
        assert found == {HealConfig(**fields, outputs="fp32")}
    heal_model(llama, HealConfig(outputs="traced"))
    assert {e.config.outputs for e in vars(llama)[RECORD].entries.values()} == {"traced"}


def test_generate_runs_the_compiled_forward_on_cpu(llama):
    """generate never compiles on CPU by itself, but calls what model.compile has set."""
    calls = []

    def backend(graph_module, example_inputs):
        calls.append(len(example_inputs))
        return graph_module.forward

    llama.compile(backend=backend, dynamic=True)
    cache = HealCache(llama.config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not compiled")
        answer(llama, [1, 2], past_key_values=cache)
    assert len(calls) == 2  # one graph for the prompt, one for a single token
    assert cache.layers[1].digits.keys.dtype == torch.int8


def test_a_compile_that_transformers_skips_is_warned_of(llama):
    config = CompileConfig(backend="heal", mode=None, options={"precision": "heal"})
    with pytest.warns(UserWarning, match="not compiled"):
        answer(llama, [1], compile_config=config, past_key_values=HealCache(llama.config, 16))


def test_compile_config_works_where_transformers_compiles(llama, llama_fp32):
    """On CPU only with a private switch of transformers; on CUDA without."""
    config = CompileConfig(backend="heal", mode=None, options={"outputs": "fp32"})
    config._compile_all_devices = True
    before = counters["stats"]["unique_graphs"]
    with pytest.warns(UserWarning, match="not compiled"):  # the prompt is run uncompiled
        answer(llama, [1], compile_config=config, past_key_values=HealCache(llama.config, 16))
    assert counters["stats"]["unique_graphs"] == before + 1


def make_cache(model, generation=None, given=None, length=20):
    """What heal_model's hook puts in place for generate."""
    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # renamed in 5.24
    arguments = {} if given is None else {name: given}
    generation = generation or GenerationConfig()
    model._prepare_cache_for_generation(generation, arguments, None, 2, length)
    return arguments.get(name)


def test_the_hook_makes_the_kind_of_cache_that_was_asked_for(llama):
    heal_model(llama)
    growing = make_cache(llama)
    assert isinstance(growing, HealCache)
    assert growing.room is None
    assert (
        make_cache(
            llama,
            GenerationConfig(cache_implementation="static", num_beams=1, num_return_sequences=1),
        ).room
        == 20
    )
    assert make_cache(llama, GenerationConfig(use_cache=False)) is None


def test_the_hook_makes_both_caches_of_an_encoder_decoder():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32
    )
    model = heal_model(transformers.T5ForConditionalGeneration(config))
    cache = make_cache(model)
    assert isinstance(cache.self_attention_cache, HealCache)
    assert isinstance(cache.cross_attention_cache, HealCache)


def test_the_hook_finds_the_cache_whatever_the_argument_is_called(llama, monkeypatch):
    """transformers 5.24 renamed it; a BF16 cache that stays in place would say nothing."""

    def prepare(self, generation_config, model_kwargs, *_):
        model_kwargs |= {"use_cache": True, "renamed": DynamicCache(config=self.config)}

    monkeypatch.setattr(type(llama), "_prepare_cache_for_generation", prepare)
    heal_model(llama)
    arguments = {}
    llama._prepare_cache_for_generation(GenerationConfig(), arguments, None, 2, 20)
    assert isinstance(arguments["renamed"], HealCache)


def test_generate_does_not_compile_a_second_time(llama):
    heal_model(llama)
    generation = GenerationConfig(compile_config=CompileConfig())
    with pytest.warns(UserWarning, match="compile_config is ignored"):
        make_cache(llama, generation)
    assert generation.disable_compile


def test_a_given_cache_is_used_refused_or_warned_of(llama):
    heal_model(llama)
    mine = HealCache(llama.config, 20)
    assert make_cache(llama, given=mine, length=20) is mine
    with pytest.raises(CacheError, match="holds 20 tokens, and generate may need 21"):
        make_cache(llama, given=mine, length=21)
    with pytest.raises(CacheError, match=r"Pass HealCache\(model.config\)"):
        make_cache(llama, given=DynamicCache(config=llama.config))
    with pytest.warns(UserWarning, match="results may depend on the batch"):
        make_cache(llama, given=StaticCache(config=llama.config, max_cache_len=20))


def test_a_cache_of_another_format_than_the_options_is_refused(llama):
    heal_model(llama, kv="int24")
    with pytest.raises(CacheError, match=r"asked for kv='int24'.*keeps int16"):
        make_cache(llama, given=HealCache(llama.config))
    given = HealCache(llama.config, kv="int24")
    assert make_cache(llama, given=given) is given


@pytest.mark.parametrize(
    ("options", "kv"),
    [({}, "int16"), ({"kv": "int24"}, "int24"), ({"precision": "layercast"}, "fp32")],
)
def test_the_options_decide_the_caches_format(llama, options, kv):
    assert make_cache(heal_model(llama, **options)).kv == kv
    assert llama.config._attn_implementation == "heal"


def test_a_layer_type_without_keys_and_values_is_warned_of(llama):
    heal_model(llama)
    llama.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.warns(UserWarning, match="no HealCache: layers of type linear_attention"):
        assert not isinstance(make_cache(llama), HealCache)


def test_a_baseline_keeps_the_cache_of_transformers(llama):
    assert not isinstance(make_cache(heal_model(llama, precision="traced")), HealCache)


def test_the_classes_of_transformers_stay_as_they_are(llama):
    before = dict(vars(transformers.GenerationMixin))
    heal_model(llama)
    assert dict(vars(transformers.GenerationMixin)) == before
    assert "_prepare_cache_for_generation" not in vars(type(llama))


def test_a_copy_hooks_itself_and_pickles(llama):
    heal_model(llama)
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert other._prepare_cache_for_generation.args[0] is other


def test_wrong_use_says_what_to_do(llama):
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        heal_model(torch.compile(llama))
    with pytest.raises(ConfigError, match="Did you mean 'precision'"):
        heal_model(llama, precisions="heal")
    with pytest.raises(ConfigError, match="kv='fp32' contradicts"):
        heal_model(llama, precision="exact", kv="fp32")
    assert llama._compiled_call_impl is None


def test_a_full_static_cache_is_refused_before_the_compiled_model(llama):
    heal_model(llama)
    cache = HealCache(llama.config, max_cache_len=6)
    llama(PROMPTS[1:2], past_key_values=cache)
    with pytest.raises(CacheError, match="HealCache is full"):
        llama(PROMPTS[1:2, :2], past_key_values=cache)
    assert int(cache.get_seq_length()) == 5


def test_a_full_static_cache_stops_a_model_compiled_without_heal_model(llama):
    """By the assertion in the graph, or by the bounds check of the store, whichever runs first."""
    llama.compile(backend="heal", dynamic=True)
    cache = HealCache(llama.config, max_cache_len=6)
    llama(PROMPTS[1:2], past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"HealCache is full|index out of bounds"):
        llama(PROMPTS[1:2, :2], past_key_values=cache)


def test_sliding_window_layers_roll_in_a_compiled_model(llama_fp32):
    config = copy.deepcopy(llama_fp32.config).to_dict() | {"sliding_window": 4}
    torch.manual_seed(1)
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()
    expected = answer(mistral, [1, 2])
    heal_model(mistral)
    assert torch.equal(answer(mistral, [1, 2]), expected)
