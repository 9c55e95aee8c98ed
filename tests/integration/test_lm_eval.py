"""lm-evaluation-harness on a local task: scores have the same bits for every batch size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from healpass import HealConfig
from healpass.errors import ConfigError
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.rewriting import Rewritten
from tests.support.tiny_llama import make_llama

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from healpass.integrations.lm_eval import HealHFLM

DATA = Path(__file__).parents[1] / "data" / "lm_eval"
BATCH_SIZES = (1, 4, 16)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def in_the_task_folder(monkeypatch):
    """The task names its file relative to the working folder."""
    monkeypatch.chdir(DATA)


def evaluate(lm, batch_size, **arguments):
    """The harness's answer: log-likelihoods of every choice of every question, and the scores."""
    result = simple_evaluate(
        model=lm,
        tasks=["heal_trivia"],
        task_manager=TaskManager(include_path=str(DATA), include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
        **arguments,
    )
    samples = sorted(result["samples"]["heal_trivia"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples], result["results"]["heal_trivia"]


def rewritten(lm, **options):
    """Let torch run the rewritten graphs: compiling exact with Inductor takes minutes."""
    backend = Rewritten(lm.model, HealConfig(**options, outputs="fp32"))._backend
    lm.model.compile(backend=backend, dynamic=True)
    return lm


def test_exact_gives_one_score_for_every_batch_size(tokenizer, in_the_task_folder):
    model = make_llama(vocab_size=len(tokenizer))
    lm = HealHFLM(model, tokenizer=tokenizer, precision="exact", device="cpu")
    assert lm.model is model
    rewritten(lm, precision="exact")
    found = []
    for size in BATCH_SIZES:
        lm.batch_size_per_gpu = size
        found.append(evaluate(lm, size))
    assert len(found[0][0]) == 8
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_plain_bf16_does_not(tokenizer, in_the_task_folder):
    """The inverse: the harness's own model, the same task, other scores."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(make_llama(vocab_size=len(tokenizer)), tokenizer=tokenizer, device="cpu")
    found = []
    for size in BATCH_SIZES:
        lm.batch_size_per_gpu = size
        found.append(evaluate(lm, size)[0])
    assert found[1] != found[0] or found[2] != found[0]


def saved(tokenizer, folder):
    make_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"pretrained={folder},precision=heal,kv=int24,dtype=bfloat16"


def test_the_name_and_its_arguments_reach_the_harness(tokenizer, tmp_path):
    """`--model heal-hf --model_args pretrained=...,precision=heal`, as its command line parses."""
    arguments = saved(tokenizer, tmp_path)
    lm = get_model("heal-hf").create_from_arg_string(arguments, {"device": "cpu"})
    assert isinstance(lm, HealHFLM)
    assert lm.model.dtype == torch.bfloat16
    assert lm.model._compiled_call_impl is not None
    (_, options) = lm.model._prepare_cache_for_generation.args
    assert (options.precision, options.kv) == ("heal", "int24")


@pytest.mark.deep
def test_the_whole_way_compiled_by_inductor(tokenizer, in_the_task_folder, tmp_path):
    arguments = saved(tokenizer, tmp_path)
    _, scores = evaluate("heal-hf", 4, model_args=arguments, device="cpu", limit=2)
    assert 0 <= scores["acc,none"] <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_debug_options_are_one_text_each(tokenizer, tmp_path):
    arguments = saved(tokenizer, tmp_path) + ",simulate=h100,order=2"
    lm = get_model("heal-hf").create_from_arg_string(arguments, {"device": "cpu"})
    (_, options) = lm.model._prepare_cache_for_generation.args
    assert (options.debug.simulate, options.debug.order) == ("h100", 2)


def test_a_wrong_option_is_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match="precision='exakt' is not one of"):
        HealHFLM("no/such/model", precision="exakt")


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("healpass.integrations.lm_eval", "lm_eval", "eval"),
        ("healpass.integrations.transformers", "transformers", "hf"),
        ("healpass.integrations.vllm.harness", "vllm", "vllm"),
    ],
)
def test_a_missing_extra_is_named_with_the_pip_command(module, package, extra):
    code = (
        f"import sys\nsys.modules[{package!r}] = None\n"
        f"try:\n    import {module}\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert f"pip install 'healpass[{extra}]'" in done.stdout
