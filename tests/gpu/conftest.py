"""Tests in this folder need an NVIDIA GPU; without one they are skipped, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Mark every test of this folder, and skip it where there is no GPU."""
    absent = pytest.mark.skip(reason="needs an NVIDIA GPU of compute capability 8.0 or newer")
    usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.gpu)
            if not usable:
                item.add_marker(absent)
