"""The guard against silent miscompiles: each template proves itself once per GPU and version.

At first use a second process multiplies small matrices through every template and compares with
FP64, exact templates bit by bit with their reference implementation on CPU. (A second process,
because a broken kernel takes down the CUDA context it runs in.) The verdict is kept in the user's
cache folder under the GPU's name, the versions and a hash of this package's sources. May import
`selfcheck_attention`, `selfcheck_exact`, `selfcheck_paged`, `kernels`, and the operators.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from healpass.cache_key import current_config
from healpass.errors import DeviceCheckError, StrictError
from healpass.lowering.cuda import (
    kernels,
    selfcheck_attention,
    selfcheck_exact,
    selfcheck_paged,
)

#: Multiplies two matrices (or batches) with the given `numerics`.
Multiply = Callable[[Tensor, Tensor, str], Tensor]

#: Seconds that the second process may take: about sixty kernels are compiled in it.
TIMEOUT = 600
UNIT = 2.0**-24

_examining: ContextVar[bool] = ContextVar("examining", default=False)


class TemplateWarning(UserWarning):
    """A matmul or attention runs without its template: correct, but slower."""


@dataclass(frozen=True)
class Problem:
    """A small product that goes through one template."""

    template: str
    a: torch.dtype
    b: torch.dtype
    rows: int
    columns: int = 304
    terms: int = 72
    numerics: str = "heal"

    def operands(self) -> tuple[Tensor, Tensor]:
        """Operands with a heavy tail: rows and columns differ in magnitude by 2^20."""
        generator = torch.Generator().manual_seed(0)
        lead = (2,) if self.template.endswith("_batched") else ()
        groups = (2,) if self.template == "grouped" else lead
        a = torch.randn(*lead, self.rows, self.terms, generator=generator)
        b = torch.randn(*groups, self.terms, self.columns, generator=generator)
        a *= 2.0 ** torch.randint(-10, 11, a.shape[:-1], generator=generator)[..., None]
        b *= 2.0 ** torch.randint(-10, 11, (self.columns,), generator=generator)
        return a.to(self.a), b.to(self.b)


def problems() -> Iterator[Problem]:
    """Every template, with every form of operand that it has.

    Sums are short where they can be: the promise 2 K u is then tight enough to notice TF32.
    (Seen: Triton 3.6 compiles an "ieee" dot of FP32 operands to TF32 on sm_100.)
    """
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for weight in (bf16, fp16, fp32):
        yield Problem("decode", fp32, weight, 5)
        yield Problem("gemm", fp32, weight, 300)
    yield Problem("gemm", fp32, bf16, 70)
    yield Problem("gemm", fp32, bf16, 70, columns=70)
    yield Problem("gemm", fp32, bf16, 300, columns=301)  # too odd for the copy engine
    yield Problem("decode", fp32, bf16, 5, terms=1000)
    yield Problem("gemm", bf16, bf16, 300)
    yield Problem("gemm_batched", fp32, fp32, 70)
    yield Problem("grouped", fp32, bf16, 70)
    yield Problem("invariant", fp32, bf16, 70, numerics="heal:::m_invariant")
    yield Problem("decode", fp32, bf16, 5, numerics="layercast")
    yield Problem("layercast", fp32, bf16, 70, numerics="layercast")
    yield Problem("layercast_batched", fp32, fp32, 70, numerics="layercast")


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; a matrix by a batch is a product per group of rows, the groups being equal."""
    if a.dim() == b.dim():
        return a @ b
    return (a.reshape(b.shape[0], -1, a.shape[1]) @ b).flatten(0, 1)


def examine(multiply: Multiply) -> dict[str, str]:
    """Run every problem; what is wrong, by template.

    A result has to keep the promise of the operator, |error| <= 2 K u |a| @ |b| with u = 2^-24.
    """
    wrong: dict[str, str] = {}
    for problem in problems():
        a, b = problem.operands()
        left, right = a.double(), b.double()
        error = (multiply(a, b, problem.numerics).double().cpu() - product(left, right)).abs()
        bound = 2 * a.shape[-1] * UNIT * product(left.abs(), right.abs())
        worst = (error / bound).max().item()
        if not worst <= 1:
            wrong[problem.template] = f"{problem}: observed / bound = {worst:.3g}"
    return wrong


def broken(template: str, device: torch.device) -> bool:
    """Whether a template failed its check on this GPU; warns loudly, once, if so."""
    index, reason = _reason(template, device)
    if reason is not None:
        _warn_once(template, torch.cuda.get_device_name(index), reason)
    return reason is not None


def usable(templates: Iterable[str], device: torch.device, what: str) -> bool:
    """Whether all templates of an operator gave right results on this GPU.

    Args:
        templates: Their names.
        device: The GPU.
        what: The operator, for the error.

    Raises:
        StrictError: One did not, and the compile was asked to be strict.
    """
    found = [name for name in templates if broken(name, device)]
    for name in found:
        refuse_if_strict(what, f"the template {name!r} failed its check on this GPU")
    return not found


def refuse_if_strict(what: str, reason: str) -> None:
    """Raise if the compile that is under way was asked to be strict.

    Raises:
        StrictError: It was.
    """
    if current_config().strict:
        raise StrictError(
            f"strict=True, but {what} cannot run through its template: {reason}.\n"
            "Leave strict out to run it through torch's own FP32 kernels: correct, but slower."
        )


def require(template: str, device: torch.device) -> None:
    """Go on only if an exact template gave the bits of its reference implementation.

    Raises:
        DeviceCheckError: It did not. There is no falling back: other bits break the promise, and
            so does a graph that is exact on one machine and unchecked on another.
    """
    index, reason = _reason(template, device)
    if reason is not None:
        gpu = torch.cuda.get_device_name(index)
        raise DeviceCheckError(
            f"precision='exact' cannot run on {gpu}: the Triton template {template!r} failed its "
            f"check there with torch {torch.__version__} and triton {_triton_version()}.\n"
            f"Found: {reason}.\nNothing runs in its place, because the bits could be others. Use "
            "another version of torch, or the CPU, which gives the same bits. Please report this."
        )


def _reason(template: str, device: torch.device) -> tuple[int, str | None]:
    """The device's index, and what is wrong with a template there; None while examining."""
    if _examining.get():
        return -1, None
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, verdict(index).get(template)


@functools.cache
def _warn_once(template: str, gpu: str, reason: str) -> None:
    warnings.warn(
        f"the Triton template {template!r} gives wrong results on {gpu} with torch "
        f"{torch.__version__} and triton {_triton_version()}: {reason}. What it would do runs "
        "through torch's own FP32 kernels instead: correct, but slower. Please report this.",
        TemplateWarning,
        stacklevel=2,
    )


@functools.cache
def verdict(index: int) -> dict[str, str]:
    """What is wrong with the templates on a GPU: from the cache folder, else by a check now."""
    path = _cache_folder() / f"{_key(torch.cuda.get_device_name(index))}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", __name__, str(index)]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
        found: dict[str, str] = json.loads(process.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        last = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1:]
        names = (*kernels.GRIDS, *kernels.EAGER)
        return dict.fromkeys(names, f"the check itself failed ({last})")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(found, file)
    os.replace(file.name, path)
    return found


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "healpass" / "templates"


def _triton_version() -> str:
    import triton

    return triton.__version__


def _key(gpu: str) -> str:
    """Hash of everything that can change what the templates compute."""
    lowering = Path(__file__).parents[1]
    sources = sorted(lowering.rglob("*.py")) + sorted(lowering.glob("templates/*.jinja"))
    versions = f"{gpu} {torch.__version__} {_triton_version()} {torch.version.cuda}"
    text = versions.encode() + b"".join(source.read_bytes() for source in sources)
    return hashlib.sha256(text).hexdigest()[:32]


def on_gpu(index: int, *, fresh: bool = True) -> Multiply:
    """Multiply as `product` through compiled code on a GPU; `fresh` compiles anew each time."""
    from healpass import lowering

    lowering.register()

    # Inductor's cache knows neither our sources nor a tile that a test has changed.
    options = {"fx_graph_cache": False}

    @functools.partial(torch.compile, fullgraph=True, dynamic=False, options=options)
    def compiled(a: Tensor, b: Tensor, numerics: str) -> Tensor:
        if a.dim() == b.dim():
            op = torch.ops.heal.mm if a.dim() == 2 else torch.ops.heal.bmm
            return op(a, b, numerics)
        rows = a.shape[0] // b.shape[0]
        ends = torch.arange(rows, a.shape[0] + 1, rows, dtype=torch.int32, device=a.device)
        return torch.ops.heal.grouped_mm(a, b, ends, numerics)

    def multiply(a: Tensor, b: Tensor, numerics: str) -> Tensor:
        if fresh:
            torch._dynamo.reset()
        return compiled(a.to(f"cuda:{index}"), b.to(f"cuda:{index}"), numerics)

    return multiply


def main() -> None:
    """Check the templates on the GPU of the given index; print what is wrong as JSON."""
    token = _examining.set(True)
    try:
        index = int(sys.argv[1])
        wrong = examine(on_gpu(index))
        wrong |= selfcheck_attention.examine(selfcheck_attention.on_gpu(index))
        wrong |= selfcheck_exact.examine(selfcheck_exact.on_gpu(index))
        wrong |= selfcheck_paged.examine(selfcheck_paged.on_gpu(index))
        sys.stdout.write(json.dumps(wrong) + "\n")
    finally:
        _examining.reset(token)


if __name__ == "__main__":
    # By its own name: as `__main__` this file is another module than the one that `matmul` asks.
    from healpass.lowering.cuda import selfcheck

    selfcheck.main()
