"""A GGUF file as the model of `healpass check`: the same weights, and why one is refused."""

import json

import gguf
import pytest
import torch
from typer.testing import CliRunner

from healpass import cli
from healpass.errors import FetchError
from healpass.integrations.checkpoint import Checkpoint
from tests.support.study_models import make_checkpoint, make_gguf, write_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def parameters(name):
    return dict(Checkpoint(str(name)).model().named_parameters())


def tensor_of(path, name):
    """One tensor of a GGUF file, dequantized by the package that defines the format."""
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    return torch.from_numpy(gguf.dequantize(found.data, found.tensor_type))


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_a_gguf_file_holds_the_same_model(folder, tmp_path, kind):
    ours, theirs = parameters(make_gguf(tmp_path / "m.gguf", folder, kind)), parameters(folder)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_blocks_are_dequantized_and_rounded_once(folder, tmp_path):
    path = make_gguf(tmp_path / "m.gguf", folder, "Q8_0")
    ours, theirs = parameters(path), parameters(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(ours[name], tensor_of(path, "blk.1.ffn_up.weight").bfloat16())
    assert not torch.equal(ours[name], theirs[name])


def test_check_runs_on_a_gguf_file(folder, tmp_path):
    path = make_gguf(tmp_path / "tiny.gguf", folder, "Q8_0")
    tasks = write_tasks(tmp_path / "tasks.jsonl", ["How many?", "Which share is it?"])
    options = ["--preset", "quick", "--precision", "exact", "--tasks", tasks, "--prompts", 2]
    options += ["--max-new-tokens", 4, "--batch-sizes", "1,2", "--out", tmp_path / "out", "--json"]
    result = CliRunner().invoke(cli.app, ["check", str(path), *map(str, options)])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout, parse_constant=pytest.fail)["precisions"]
    assert found["bit_identical"] is True
    assert "tiny.gguf" in (tmp_path / "out" / "report.html").read_text()


def unreadable_type(path, folder):
    """Q8_1 is a format of activations; nobody unpacks it as weights."""
    return make_gguf(path, folder, "Q8_1")


def without_layers(path, folder):
    """A file whose tensors have names that its architecture does not know."""
    content = make_gguf(path, folder).read_bytes()
    path.write_bytes(content.replace(b"blk.1.", b"blk.9."))
    return path


def foreign(path, folder):
    content = make_gguf(path, folder).read_bytes()
    path.write_bytes(content.replace(b"llama", b"lemma"))
    return path


def cut(path, folder):
    content = make_gguf(path, folder).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def noise(path, folder):
    path.write_bytes(b"no model at all")
    return path


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (unreadable_type, "Q8_1"),
        (without_layers, "its parameters are not in it, as model.layers.1."),
        (foreign, "lemma"),
        (cut, "taken as GGUF file"),
        (noise, "taken as GGUF file"),
    ],
)
def test_a_gguf_file_that_cannot_be_read_is_refused(folder, tmp_path, spoil, reason):
    path = spoil(tmp_path / "bad.gguf", folder)
    with pytest.raises(FetchError, match="cannot load") as error:
        Checkpoint(str(path)).model()
    assert reason in str(error.value)


#: What is wrong with the tokenizer, and what the error says of it.
BROKEN_TOKENIZERS = {
    "no model": ({"tokenizer_model": None}, "it has no tokenizer.ggml.model"),
    "unknown model": ({"tokenizer_model": "nonsense"}, "'nonsense'"),
    "no tokens": ({"token_list": None}, "it has no tokenizer.ggml.tokens"),
    "no merges": ({"token_merges": None}, "it has no tokenizer.ggml.merges"),
    "one part": ({"token_merges": ["ab"]}, "its merge 0, 'ab', is not two tokens"),
    "unknown part": ({"token_merges": ["a b", "a \u4e00"]}, "its merge 1, 'a \u4e00', needs"),
    "unknown result": ({"token_merges": ["b a"]}, "needs the token 'ba', which is not among"),
    "few tokens": ({"token_list": ["a", "ab"]}, "needs the token 'b', which is not among its 2"),
    "end": ({"eos_token_id": 999}, "its tokenizer.ggml.eos_token_id is 999, but it has 128"),
    "padding": ({"pad_token_id": 128}, "its tokenizer.ggml.padding_token_id is 128, but it has"),
    "another model's": (
        {"token_list": [f"<{i}>" for i in range(128)] + ["ab", *map(chr, range(33, 290))]},
        "but the model has 128 tokens only",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_wrong_use_and_no_traceback(folder, tmp_path, fault):
    entries, reason = BROKEN_TOKENIZERS[fault]
    path = make_gguf(tmp_path / "bad.gguf", folder, **entries)
    tasks = write_tasks(tmp_path / "tasks.jsonl", ["How many?"])
    options = ["--tasks", tasks, "--prompts", 1, "--out", tmp_path / "out"]
    result = CliRunner().invoke(cli.app, ["check", str(path), *map(str, options)])
    assert result.exit_code == 2, result.output
    message = result.stderr.replace("\n", " ")
    assert reason in message
    assert "Give a" in message or "Give the" in message, "the way out"


def test_bytes_that_are_no_text_are_refused(folder, tmp_path):
    path = make_gguf(tmp_path / "bad.gguf", folder)
    path.write_bytes(path.read_bytes().replace(b"<unused5>", b"<\xffnused5>"))
    with pytest.raises(
        FetchError, match=r"cannot load .* as a tokenizer, .*can't decode byte 0xff"
    ):
        Checkpoint(str(path)).tokenizer()


def test_a_folder_without_all_parameters_is_refused(folder, tmp_path):
    """transformers only warns, and the study would be one of random numbers."""
    from safetensors.torch import load_file, save_file

    half = make_checkpoint(tmp_path / "half")
    path = half / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        FetchError, match=r"1 of its parameters are not in it, as model\.layers\.0"
    ):
        Checkpoint(str(half)).model()
