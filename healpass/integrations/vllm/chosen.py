"""The attention backend of the engine that is being built. Imports vLLM.

vLLM asks a backend for the size of its pages without saying for which engine, so there is one per
format; and its CPU platform knows one name, whatever was asked for. Both names below are looked up
while the engine's configuration is at hand (PEP 562).
"""

from __future__ import annotations

from typing import Any

from healpass.integrations.vllm.options import current


def __getattr__(name: str) -> Any:
    if name not in ("Backend", "CpuBackend"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    options = current()
    if options is None and name == "CpuBackend":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    if options is None:
        raise AttributeError(f"{name}: the engine has no quantization='heal', which it serves")
    from healpass.integrations.vllm.attention import BACKENDS

    return BACKENDS[options.kv]
