"""What a result depends on besides the code: versions, processor, threads and precision flags.

Layer: beside `report`. Imports the numerics version only. `healpass env` prints it, and
every report carries it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import operator
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from healpass.numerics_version import NUMERICS_VERSION

PACKAGES = ("healpass", "torch", "triton", "transformers", "accelerate", "numpy", "sympy")

#: Variables that change numerics or the order of work of torch, cuBLAS, MKL, oneDNN or OpenMP.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "KMP_AFFINITY",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "ONEDNN_MAX_CPU_ISA",
    "TORCHINDUCTOR_BATCH_INVARIANT",
    "TORCHINDUCTOR_DETERMINISTIC",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_F32_DEFAULT",
    "TRITON_INTERPRET",
)


@dataclass(frozen=True)
class Gpu:
    """One accelerator that torch can see."""

    name: str
    compute_capability: str
    memory_gib: float
    multiprocessors: int


@dataclass(frozen=True)
class Environment:
    """A snapshot of everything outside the code that can change a result or a timing."""

    numerics_version: int
    """Of the bits of `precision="exact"`."""
    python: str
    system: str
    packages: Mapping[str, str | None]
    """Versions by package; None where it is not installed."""
    cpu: str
    cpu_cores: int
    cpu_capability: str
    """The widest vector instructions that torch uses, as `AVX512`."""
    threads: int
    interop_threads: int
    cuda: str | None
    gpus: tuple[Gpu, ...]
    precision_flags: Mapping[str, str]
    """torch's switches for FP32 arithmetic (TF32, BF16), by their path in torch."""
    deterministic_algorithms: bool
    variables: Mapping[str, str]
    """Those of `VARIABLES` that are set."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("packages", "precision_flags", "variables"):
            fields[name] = dict(fields[name])
        return fields | {"gpus": [dataclasses.asdict(gpu) for gpu in self.gpus]}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Settings that let arithmetic outside HEAL's operators fall below FP32, one line each."""
        lowered = [
            f"{flag}={value}: FP32 work outside HEAL's operators is not IEEE FP32"
            for flag, value in self.precision_flags.items()
            if value in ("tf32", "bf16") and (self.gpus or ".cud" not in flag)
        ]
        if self.variables.get("NVIDIA_TF32_OVERRIDE") == "1":
            lowered.append("NVIDIA_TF32_OVERRIDE=1 forces TF32 in every NVIDIA library")
        return tuple(lowered)


def collect() -> Environment:
    """Look around. Changes nothing and needs no GPU."""
    return Environment(
        numerics_version=NUMERICS_VERSION,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: _version(name) for name in PACKAGES},
        cpu=_cpu_name(),
        cpu_cores=os.cpu_count() or 1,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        interop_threads=torch.get_num_interop_threads(),
        cuda=torch.version.cuda,
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        precision_flags=_precision_flags(),
        deterministic_algorithms=torch.are_deterministic_algorithms_enabled(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _version(package: str) -> str | None:
    if package == "torch":  # the build tag (+cpu, +cu128) is only here
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        name=properties.name,
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_gib=round(properties.total_memory / 2**30, 1),
        multiprocessors=properties.multi_processor_count,
    )


def _precision_flags() -> dict[str, str]:
    """Read the `fp32_precision` switches only: torch refuses to mix them with the older ones."""
    switches = ("", ".cuda.matmul", ".cudnn", ".cudnn.conv", ".mkldnn.matmul")
    paths = [f"backends{switch}.fp32_precision" for switch in switches]
    return {f"torch.{path}": str(operator.attrgetter(path)(torch)) for path in paths}
