"""The wheel and the source archive: complete, and installed they do what the repository does."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"
ONE_LINE = """
import torch
import healpass
model = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
x = torch.randn(2, 8, dtype=torch.bfloat16)
model = torch.compile(model, backend="heal", options={"precision": "exact", "outputs": "fp32"})
with torch.no_grad():
    assert torch.equal(model(x)[:1], model(x[:1])), "exact: a row has its bits in any batch"
print(model(x).dtype, healpass.__file__)
"""


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def built(kind: str, source: Path, into: Path) -> Path:
    """A wheel or a source archive, by the build backend that pip would call."""
    into.mkdir(exist_ok=True)
    code = BUILD.format(kind=kind, folder=str(into))
    return into / run(sys.executable, "-c", code, folder=source).splitlines()[-1]


def ours() -> list[str]:
    """The files of the package, as they lie in the repository."""
    found = (path for name in ("healpass", "lowering") for path in (ROOT / name).rglob("*"))
    files = (path for path in found if path.is_file() and "__pycache__" not in path.parts)
    return [str(path.relative_to(ROOT)) for path in files]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, Path]:
    """The source archive, and the wheel that is built of it."""
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "repository"
    for name in ("pyproject.toml", "README.md", "LICENSE", *ours()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    source = built("sdist", copy, folder / "dist")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return {"sdist": source, "wheel": built("wheel", unpacked, folder / "dist")}


def test_the_wheel_holds_every_file_of_the_package(archives):
    """A folder that no list names would be left out in silence."""
    wanted = {n.replace("lowering/", "healpass/lowering/", 1) if n.startswith("lowering/") else n
              for n in ours()}  # fmt: skip
    held = {n for n in zipfile.ZipFile(archives["wheel"]).namelist() if ".dist-info" not in n}
    assert held == wanted


def test_the_source_archive_holds_the_license_and_the_readme(archives):
    with tarfile.open(archives["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "lowering/__init__.py"} <= names


def test_installed_elsewhere_it_runs_the_one_line(archives, tmp_path):
    """In an environment of its own, which borrows torch and the others from this one."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(archives["wheel"]).extractall(site)  # all that pip does with a pure wheel
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    printed = run(python, "-c", ONE_LINE, folder=tmp_path).split()
    assert printed == ["torch.float32", str(site / "healpass" / "__init__.py")]
