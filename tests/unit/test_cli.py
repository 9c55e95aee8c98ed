"""The command line: what it prints, as text and as JSON, and how a mistake ends."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from healpass import cli
from healpass.numerics_version import NUMERICS_VERSION

transformers = pytest.importorskip("transformers")


class Tokenizer:
    def __call__(self, text, return_tensors):
        assert return_tensors == "pt"
        return {"input_ids": torch.arange(len(text.split()))[None]}


@pytest.fixture
def tiny(monkeypatch):
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    monkeypatch.setattr(cli, "_load", lambda _: (model, Tokenizer()))


def run(*arguments):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_env_names_the_versions():
    text = run("env")
    assert torch.__version__ in text
    assert "threads" in text


def test_env_as_json_is_json_and_nothing_else():
    found = json.loads(run("env", "--json"))
    assert found["packages"]["torch"] == torch.__version__
    assert found["numerics_version"] == NUMERICS_VERSION


def test_explain_lists_the_nodes(tiny):
    text = run("explain", "any", "--prompt", "a b c")
    assert "9 of 9 matmul and SDPA nodes rewritten" in text
    assert "lm_head" in text


def test_explain_as_json_keeps_the_options(tiny):
    report = json.loads(run("explain", "any", "--precision", "layercast", "--json"))
    assert report["config"]["precision"] == "layercast"
    assert all(node["heal_op"] for graph in report["graphs"] for node in graph["nodes"])


class Echo(torch.nn.Module):
    """A language model that compiles fast."""

    def forward(self, input_ids, use_cache):
        del use_cache
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 8).float())


def test_a_fingerprint_is_as_expected_or_exit_status_1(monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda _: (Echo(), Tokenizer()))
    found = json.loads(run("fingerprint", "any", "--prompt", "a b c", "--json"))
    assert found["options"]["precision"] == "exact"
    expected = ("fingerprint", "any", "--prompt", "a b c", "--expect", found["digest"])
    assert found["digest"] in run(*expected)
    other = CliRunner().invoke(cli.app, [*expected[:-1], "0" * 64])
    assert other.exit_code == 1
    assert "differs: the digest is" in other.stderr


def main_fails(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["healpass", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr().err


def test_a_wrong_option_ends_with_one_message(monkeypatch, capsys):
    code, message = main_fails(monkeypatch, capsys, "explain", "any", "--precision", "haal")
    assert code == 1
    assert message.startswith("error: precision='haal'")
    assert "Did you mean 'heal'?" in message
    assert "Traceback" not in message


def test_a_model_that_is_not_there_ends_with_one_message(monkeypatch, capsys, tmp_path):
    code, message = main_fails(monkeypatch, capsys, "explain", str(tmp_path))
    assert code == 1
    assert message.startswith(f"error: cannot load {str(tmp_path)!r}")
    assert "smollm2-135m" in message


def test_explain_observes_errors_on_request(tiny):
    assert "4 sigma" not in run("explain", "any")
    text = run("explain", "any", "--observe")
    assert "4 sigma" in text
    assert "proved" in text
