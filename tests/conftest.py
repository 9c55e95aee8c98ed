"""What every test shares: Hypothesis profiles, a fresh compile cache, a fresh Dynamo."""

import atexit
import os
import shutil
import tempfile

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


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Forget compiled code and counters after each test: none meets another's limits or breaks."""
    yield
    import torch

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
