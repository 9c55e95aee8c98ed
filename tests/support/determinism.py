"""A pytest plugin: vLLM's own tests of determinism run on a CPU; their files stay as they are.

    python -m pytest -p tests.support.determinism --arithmetic exact -c /dev/null FILE::TEST

The tests know accelerators only, and ask for dtype and attention by name. So the plugin gives them

- a backend of this machine, in place of the marks that skip them here;
- an engine of HEAL's (`--arithmetic exact`) or of vLLM's BF16 (`plain`) where they make an `LLM`;
- no `VLLM_BATCH_INVARIANT`, which their conftest sets: HEAL refuses it, and vLLM's Triton kernels,
  which it switches on, do not start on a CPU;
- greedy requests where a prompt is cut into chunks: vLLM 0.32 turns a generator back there, and a
  CPU's has no offset.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

#: What their engines say that HEAL, or a CPU, says otherwise.
SETTLED = ("attention_config", "dtype", "disable_custom_all_reduce")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--arithmetic`."""
    parser.addoption("--arithmetic", choices=["exact", "plain"], required=True)


def pytest_configure(config: pytest.Config) -> None:
    """Before their files are imported."""
    import vllm

    config.addinivalue_line("markers", "flaky(reruns): not run again here")
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    engine = engine_of(config.getoption("--arithmetic"), vllm.LLM)
    (file,) = {Path(argument.split("::")[0]).resolve() for argument in config.args}
    patch.setattr(sys, "path", [str(file.parent), *sys.path])
    import utils  # theirs, which needs vLLM to be imported whole

    runs_here = pytest.mark.filterwarnings("default")
    patch.setattr(utils, "BACKENDS", ["here"])
    patch.setattr(utils, "skip_unsupported", runs_here)
    patch.setattr(utils, "skip_if_not_cuda", runs_here)
    patch.setattr(vllm, "LLM", engine)


def engine_of(arithmetic: str, make: Any) -> Any:
    """What stands where their files say `LLM`."""
    from healpass.integrations.vllm import engine_args

    def engine(model: str, **theirs: Any) -> Any:
        given = {name: value for name, value in theirs.items() if name not in SETTLED}
        if arithmetic == "plain":
            return make(model=model, dtype="bfloat16", enforce_eager=True, **given)
        return make(**engine_args(model, engine=given, precision="exact"))

    return engine


@pytest.fixture(autouse=True)
def without_vllms_own(enable_batch_invariant_mode: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After their fixture, which asks for it."""
    from vllm import envs

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", False)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")


@pytest.fixture(autouse=True)
def greedy_in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the one test that cuts prompts."""
    if "chunked_prefill" in request.node.name:
        theirs = request.module.SamplingParams
        greedy = {"temperature": 0.0, "seed": None}
        monkeypatch.setattr(request.module, "SamplingParams", lambda **k: theirs(**k | greedy))
