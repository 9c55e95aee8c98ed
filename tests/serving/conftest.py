"""Tests inside vLLM: `make test-vllm` runs them in an environment of their own."""

import importlib.util
import os

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# Before vLLM is imported: engines in this process, on the CPUs that it has, no word to anybody.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_AOT_COMPILE="0",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny Llama."""
    from tests.support.engines import save_model  # vLLM reads the variables when it is imported

    return save_model("llama", tmp_path_factory.mktemp("llama"))
