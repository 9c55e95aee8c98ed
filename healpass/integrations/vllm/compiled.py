"""`CompilationConfig.backend` for vLLM: `backend="heal"` with the engine's options.

vLLM hands no options to a backend that is not Inductor. It looks the backend up by its name while
the engine's configuration is at hand, though: `backend` is an attribute that is made when it is
asked for (PEP 562). Imports `options`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch._dynamo.backends.registry import lookup_backend

from healpass.errors import UnavailableError
from healpass.integrations.vllm.options import current


def __getattr__(name: str) -> Any:
    if name != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    options = current()
    if options is None:
        raise UnavailableError(
            f"{__name__}.backend compiles for engines with quantization='heal', and this one has "
            "another.\nUse healpass.integrations.vllm.engine_args, or backend='heal' and its "
            "defaults."
        )
    return partial(lookup_backend("heal"), options=options.config)
