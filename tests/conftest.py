"""What every test shares: Hypothesis profiles, a fresh compile cache, a fresh Dynamo."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A compile that is killed can leave a truncated library in the cache, so each run gets its own.
# The workers of pytest-xdist inherit the variables, and share the folder.
for _variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    if _variable not in os.environ:
        os.environ[_variable] = tempfile.mkdtemp(prefix="healpass-test-")
        atexit.register(shutil.rmtree, os.environ[_variable], ignore_errors=True)

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors)
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    max_examples=50,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "deep", settings.get_profile("default"), derandomize=False, max_examples=1000
)
settings.load_profile("default")


#: Tests, or single parameters of them, that only `make test-full` runs.
FULL = {
    line
    for line in Path(__file__).with_name("full.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the tests of `full.txt`; a line of it that names no test is an error."""
    named = set()
    for item in items:
        names = FULL & {item.nodeid, item.nodeid.split("[")[0]}
        if names:
            item.add_marker(pytest.mark.full)
            named |= names
    everything = [Path(argument) for argument in config.args] in ([Path("tests")], [Path.cwd()])
    if everything and FULL - named:
        raise pytest.UsageError(f"tests/full.txt names no test: {sorted(FULL - named)}")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """One seed before each test; after it, forget compiled code and counters of Dynamo.

    So no test meets another's numbers, limits or breaks.
    """
    import torch

    torch.manual_seed(0)
    yield

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
