"""The pins fight no requirement of torch's own: a stock pip has to resolve them."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[2]
#: torch -> the Triton that its wheels in the public registry require (their metadata).
TRITON_OF_TORCH = {
    "2.11.0": "==3.6.0",
    "2.12.0": "==3.7.0",
    "2.13.0": "==3.7.1",
    "2.14.1": "~=3.8.0",
    "2.15.0": "~=3.9.0",
}


def pins() -> dict[str, str]:
    """Name -> version, from constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def ours(name: str) -> SpecifierSet:
    """What healpass itself requires of a package, whatever the platform."""
    requirements = map(Requirement, importlib.metadata.requires("healpass") or ())
    (found,) = {item.specifier for item in requirements if item.name == name}
    return found


def assert_compatible(pinned: dict[str, str], required: str) -> None:
    assert pinned["triton"] in SpecifierSet(required), (
        f"constraints.txt pins triton {pinned['triton']}, "
        f"torch {pinned['torch']} requires {required}"
    )


def test_the_pinned_triton_is_the_one_that_the_pinned_torch_requires():
    assert_compatible(pins(), TRITON_OF_TORCH[pins()["torch"]])


def test_the_installed_torch_requires_a_triton_that_we_accept():
    """Nothing is to be asked of a build for CPU, which names none; those of the registry do."""
    requirements = map(Requirement, importlib.metadata.requires("torch") or ())
    named = {str(item.specifier) for item in requirements if item.name == "triton"}
    for required in named:
        assert re.sub("[=~]+", "", required) in ours("triton")
    if Version(torch.__version__).base_version == pins()["torch"]:
        assert named <= {TRITON_OF_TORCH[pins()["torch"]]}


def test_every_supported_torch_requires_a_triton_that_we_accept():
    """`triton>=3.6` and torch's own requirement have a version in common."""
    for version, required in TRITON_OF_TORCH.items():
        assert version in ours("torch")
        assert re.sub("[=~]+", "", required) in ours("triton")


def test_another_triton_is_noticed():
    with pytest.raises(
        AssertionError, match=r"pins triton 3\.9\.0, torch 2\.13\.0 requires ==3\.7\.1"
    ):
        assert_compatible({"torch": "2.13.0", "triton": "3.9.0"}, TRITON_OF_TORCH["2.13.0"])
