"""The guard against silent miscompiles: each template proves itself once per GPU and version.

At first use of a template a second process runs its checks: small problems, compared with FP64,
those of exact templates bit by bit with their reference implementation on CPU. (A second process,
because a broken kernel takes down the CUDA context it runs in.) What it finds is kept in the
user's cache folder, a file per template, under the GPU's name, the versions and a hash of this
package's sources. May import `checking`, its parts (`selfcheck_matmul` and so on), and operators.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path

import torch

from healpass.cache_key import current_config
from healpass.errors import DeviceCheckError, StrictError
from healpass.lowering.cuda import (
    selfcheck_attention,
    selfcheck_exact,
    selfcheck_matmul,
    selfcheck_paged,
)
from healpass.lowering.cuda.checking import Part, examined

#: Seconds that the check of a template may take: it takes some twenty.
TIMEOUT = 300
#: What the line of the second process's answer begins with; compilers print, too.
ANSWER = "checked: "
PARTS: tuple[Part, ...] = (
    selfcheck_matmul,
    selfcheck_attention,
    selfcheck_exact,
    selfcheck_paged,
)

_examining: ContextVar[bool] = ContextVar("examining", default=False)


class TemplateWarning(UserWarning):
    """A matmul or attention runs without its template: correct, but slower."""


def every() -> list[str]:
    """The name of every template, in the order of the parts."""
    checks = (check for part in PARTS for check in part.checks())
    return list(dict.fromkeys(name for check in checks for name in check.templates))


def broken(template: str, device: torch.device) -> bool:
    """Whether a template failed its check on this GPU; warns loudly, once, if so."""
    index, reason = _reason(template, device)
    if reason is not None:
        _warn_once(template, torch.cuda.get_device_name(index), reason)
    return reason is not None


def usable(templates: Iterable[str], device: torch.device, what: str) -> bool:
    """Whether all templates of an operator gave right results on this GPU.

    Args:
        templates: Their names.
        device: The GPU.
        what: The operator, for the error.

    Raises:
        StrictError: One did not, and the compile was asked to be strict.
    """
    found = [name for name in templates if broken(name, device)]
    for name in found:
        refuse_if_strict(what, f"the template {name!r} failed its check on this GPU")
    return not found


def refuse_if_strict(what: str, reason: str) -> None:
    """Raise if the compile that is under way was asked to be strict.

    Raises:
        StrictError: It was.
    """
    if current_config().strict:
        raise StrictError(
            f"strict=True, but {what} cannot run through its template: {reason}.\n"
            "Leave strict out to run it through torch's own FP32 kernels: correct, but slower."
        )


def require(template: str, device: torch.device) -> None:
    """Go on only if an exact template gave the bits of its reference implementation.

    Raises:
        DeviceCheckError: It did not. There is no falling back: other bits break the promise, and
            so does a graph that is exact on one machine and unchecked on another.
    """
    index, reason = _reason(template, device)
    if reason is not None:
        gpu = torch.cuda.get_device_name(index)
        raise DeviceCheckError(
            f"precision='exact' cannot run on {gpu}: the Triton template {template!r} failed its "
            f"check there with torch {torch.__version__} and triton {_triton_version()}.\n"
            f"Found: {reason}.\nNothing runs in its place, because the bits could be others. Use "
            "another version of torch, or the CPU, which gives the same bits. Please report this."
        )


def _reason(template: str, device: torch.device) -> tuple[int, str | None]:
    """The device's index, and what is wrong with a template there; None while examining."""
    if _examining.get():
        return -1, None
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, verdict(index, template)


@functools.cache
def _warn_once(template: str, gpu: str, reason: str) -> None:
    warnings.warn(
        f"the Triton template {template!r} gives wrong results on {gpu} with torch "
        f"{torch.__version__} and triton {_triton_version()}: {reason}. What it would do runs "
        "through torch's own FP32 kernels instead: correct, but slower. Please report this.",
        TemplateWarning,
        stacklevel=2,
    )


@functools.cache
def verdict(index: int, template: str) -> str | None:
    """What is wrong with a template on a GPU, or None: from the cache folder, else by a check now.

    A check that raised, crashed or ran out of time condemns the template that was asked for and no
    other, in this process: the next one tries again.

    Args:
        index: Of the GPU.
        template: Its name.
    """
    folder = _cache_folder() / _key(torch.cuda.get_device_name(index))
    kept = folder / f"{template}.json"
    if kept.is_file():
        reason: str | None = json.loads(kept.read_text(encoding="utf-8"))
        return reason
    found = asked(f"cuda:{index}", template)
    if isinstance(found, str):
        return f"the check itself failed ({found})"
    for name, reason in found.items():
        _keep(folder / f"{name}.json", reason)
    return found[template]


def asked(device: str, template: str) -> dict[str, str | None] | str:
    """What a second process answers, or its last words if it does not.

    Args:
        device: As in `answers`.
        template: As in `answers`.
    """
    command = [sys.executable, "-m", __name__, device, template]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except (subprocess.SubprocessError, OSError) as error:
        return str(error)
    for line in process.stdout.splitlines():
        if line.startswith(ANSWER):
            found: dict[str, str | None] = json.loads(line.removeprefix(ANSWER))
            return found
    *_, last = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
    return last


def _keep(path: Path, reason: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(reason, file)
    os.replace(file.name, path)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "healpass" / "templates"


def _triton_version() -> str:
    import triton

    return triton.__version__


def _key(gpu: str) -> str:
    """Hash of everything that can change what the templates compute."""
    lowering = Path(__file__).parents[1]
    sources = sorted(lowering.rglob("*.py")) + sorted(lowering.glob("templates/*.jinja"))
    versions = f"{gpu} {torch.__version__} {_triton_version()} {torch.version.cuda}"
    text = versions.encode() + b"".join(source.read_bytes() for source in sources)
    return hashlib.sha256(text).hexdigest()[:32]


def answers(device: str, template: str) -> dict[str, str | None]:
    """Check a template here and now; what is wrong with it, None if nothing is.

    Args:
        device: As torch names it. (On CPU the checks examine what stands for the template there.)
        template: Its name; templates that share all of their checks with it are answered too.
    """
    part, *_ = (
        part for part in PARTS if any(template in check.templates for check in part.checks())
    )
    token = _examining.set(True)
    try:
        return examined(part, device, template)
    finally:
        _examining.reset(token)


def main() -> None:
    """Check a template on a device, as the arguments name them; print what is found."""
    device, template = sys.argv[1:]
    sys.stdout.write(f"{ANSWER}{json.dumps(answers(device, template))}\n")


if __name__ == "__main__":
    # By its own name: as `__main__` this file is another module than the one that `matmul` asks.
    from healpass.lowering.cuda import selfcheck

    selfcheck.main()
