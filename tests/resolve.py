"""Whether the pins resolve from the public registry alone: `python3 -m tests.resolve`.

For each Python that the package's metadata names and that is at hand (on PATH, or installed by
pyenv): `pip install --dry-run` of the package and its tools under constraints.txt, in an empty
environment, with every local link, index and configuration of pip switched off. Only metadata is
fetched. The inverse goes first: with a Triton that torch does not require, resolving has to fail.

Exit status 1 where a resolution fails, with pip's own message, or where the inverse does not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Settings of pip that say how to reach the registry, and not what is found there.
REACHING = ("PIP_CERT", "PIP_CLIENT_CERT", "PIP_DEFAULT_TIMEOUT", "PIP_PROXY", "PIP_RETRIES")
#: A Triton that the pinned torch does not require.
WRONG = "triton==3.9.0"


def named() -> list[str]:
    """The Python versions in the package's metadata, as `3.11`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: "
    return [line.removeprefix(prefix) for line in project["classifiers"] if prefix in line]


def candidates(version: str) -> Iterator[str]:
    """Where an interpreter of that version may be: here, on PATH, under pyenv."""
    yield sys.executable
    for folder in os.get_exec_path():
        yield str(Path(folder, f"python{version}"))
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)
        versions = Path(root.stdout.strip(), "versions")
        yield from (str(path) for path in sorted(versions.glob(f"{version}.*/bin/python")))


def interpreter(version: str) -> str | None:
    """An interpreter that runs, is of that version and can make an environment, or `None`."""
    # (A shim of pyenv is on PATH and runs only where its version is switched on.)
    probe = "import sys, venv, ensurepip; print('{}.{}'.format(*sys.version_info))"
    for path in candidates(version):
        if not os.access(path, os.X_OK):
            continue
        found = subprocess.run([path, "-c", probe], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip() == version:
            return path
    return None


def bare(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what tells pip, or Python, of anything local."""
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith(("PIP_", "PYTHON")) or name in REACHING
    }
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def resolved(python: Path, constraints: Path) -> subprocess.CompletedProcess[str]:
    """What pip says to an installation of the package and its tools, without the installation."""
    arguments = [
        *(str(python), "-m", "pip", "install", "--dry-run", "--ignore-installed"),
        # Where the registry offers no metadata beside a wheel, read those bytes of it alone.
        *("--use-feature=fast-deps", "--constraint", str(constraints), ".[dev]"),
    ]
    return subprocess.run(
        arguments, cwd=ROOT, env=bare(os.environ), capture_output=True, text=True, check=False
    )


def environment(python: str, folder: Path) -> Path:
    """A fresh environment with the newest pip: an old one fetches whole wheels to resolve."""
    for command in (
        [python, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--upgrade", "pip"],
    ):
        subprocess.run(command, env=bare(os.environ), check=True)
    return folder / "bin" / "python"


def with_wrong_triton(folder: Path) -> Path:
    """The constraints with a Triton that fights torch's own requirement."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    wrong, count = re.subn(r"^triton==.*$", WRONG, pins, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"constraints.txt pins triton {count} times, not once")
    path = folder / "wrong.txt"
    path.write_text(wrong, encoding="utf-8")
    return path


def check(version: str, python: str, *, inverse: bool) -> bool:
    """Resolve for one Python, print what came of it, and say whether all is well."""
    with tempfile.TemporaryDirectory() as name:
        started, folder = time.monotonic(), Path(name)
        fresh = environment(python, folder / "venv")
        if inverse:
            refused = resolved(fresh, with_wrong_triton(folder))
            reason = re.search(r"torch \S+ depends on triton\S+", refused.stdout)
            if refused.returncode == 0 or reason is None:
                print(f"Python {version}: {WRONG} was not refused")
                print(refused.stdout[-2000:], refused.stderr, sep="\n")
                return False
            print(f"Python {version}: {WRONG} is refused, as it must be: {reason[0]}", flush=True)
        result = resolved(fresh, ROOT / "constraints.txt")
        if result.returncode:
            print(f"Python {version}: the pins do not resolve from the registry alone")
            print(result.stdout[-2000:], result.stderr, sep="\n")
            return False
        seconds = time.monotonic() - started
        would = re.findall(r"(?:torch|triton)-[0-9][\w.+]*", result.stdout.splitlines()[-1])
        print(f"Python {version}: resolves, {' '.join(would)} ({seconds:.0f} s)", flush=True)
        return True


def main() -> int:
    """Check every Python at hand; those that are not are named."""
    found = {version: interpreter(version) for version in named()}
    for version in (version for version, python in found.items() if python is None):
        print(f"Python {version}: not at hand")
    at_hand = {version: python for version, python in found.items() if python is not None}
    if not at_hand:
        print("none of the Pythons that the metadata names is at hand")
        return 1
    first = next(iter(at_hand))
    fine = [check(version, at_hand[version], inverse=version == first) for version in at_hand]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
