"""A digest of a model's logits, for two machines to compare.

Layer: beside `report`. Uses the public option record, the numerics version, and torch.compile.

The digest is the SHA-256 of, in this order:

1. the line `healpass logits 1`, the dtype (`float32`, `bfloat16`, `float16`) and the shape
   (`1,5,49152`), each in ASCII and ended by a newline;
2. the elements in row-major order, little-endian, every zero as +0 and every NaN as the quiet NaN
   without a payload (0x7FC00000, 0x7FC0, 0x7E00).

So neither the machine's byte order nor the memory layout shows, nor what IEEE 754 leaves open.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from healpass.config import HealConfig
from healpass.errors import ConfigError, DtypeError
from healpass.numerics_version import NUMERICS_VERSION

HEADER = "healpass logits 1"
HEX_DIGITS = 64


@dataclass(frozen=True)
class _Layout:
    """Integers of a float's size, in numpy's words, and its sign bit and quiet NaN."""

    name: str
    integers: torch.dtype
    little_endian: str
    sign: int
    nan: int


_LAYOUTS = {
    torch.float32: _Layout("float32", torch.int32, "<i4", -(1 << 31), 0x7FC00000),
    torch.bfloat16: _Layout("bfloat16", torch.int16, "<i2", -(1 << 15), 0x7FC0),
    torch.float16: _Layout("float16", torch.int16, "<i2", -(1 << 15), 0x7E00),
}


def digest(logits: Tensor) -> str:
    """The SHA-256 of the canonical bits of FP32, BF16 or FP16 `logits`, any shape, as hex.

    Raises:
        DtypeError: The dtype is another.
    """
    layout = _LAYOUTS.get(logits.dtype)
    if layout is None:
        raise DtypeError(
            f"a fingerprint of {logits.dtype} is not defined: logits are float32, bfloat16 or "
            "float16. Cast them first."
        )
    shape = ",".join(map(str, logits.shape))
    head = f"{HEADER}\n{layout.name}\n{shape}\n"
    x = logits.detach().cpu().contiguous()
    bits = x.view(layout.integers)
    bits = torch.where(bits == layout.sign, 0, bits).masked_fill(x.isnan(), layout.nan)
    body = bits.numpy().astype(layout.little_endian).tobytes()
    return hashlib.sha256(head.encode() + body).hexdigest()


def state_digest(model: nn.Module) -> str:
    """The SHA-256 of names and bits of all parameters and buffers, in the order of their names.

    Buffers that are made when a model is loaded count: torch's `pow`, which makes the frequencies
    of a rotary embedding, may round otherwise on another processor.
    """
    total = hashlib.sha256()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What two machines compare: equal `tokens`, `options` and `state` must give one `digest`.

    Attributes:
        digest: Of the logits (`digest`).
        numerics_version: The bits may differ between two of these.
        options: Of the compile, those that are not the default.
        tokens: The ids that the model was given.
        state: Digest of the model's parameters and buffers (`state_digest`).
        dtype: Of the logits.
        shape: Of the logits.
        torch: Its version. It must not matter.
        device: What ran it. It must not matter.
    """

    digest: str
    numerics_version: int
    options: dict[str, Any]
    tokens: list[list[int]]
    state: str
    dtype: str
    shape: tuple[int, ...]
    torch: str
    device: str

    def to_json(self) -> str:
        """All of it, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        """A line for each field, the digest first."""
        fields = dataclasses.asdict(self)
        width = max(map(len, fields))
        return "\n".join(f"{name:{width}}  {value}" for name, value in fields.items())


def fingerprint(model: nn.Module, tokens: Tensor, config: HealConfig) -> Fingerprint:
    """Compile a causal language model, run it on `tokens` `[B, L]`, and digest its logits.

    Args:
        model: Called with `input_ids` and `use_cache=False`; the result has `logits`.
        tokens: INT64.
        config: The options of the compile.
    """
    options = config.changed()
    compiled = torch.compile(model, backend="heal", options=options)
    with torch.no_grad():
        logits = compiled(input_ids=tokens, use_cache=False).logits
    return Fingerprint(
        digest=digest(logits),
        numerics_version=NUMERICS_VERSION,
        options=options,
        tokens=tokens.tolist(),
        state=state_digest(model),
        dtype=_LAYOUTS[logits.dtype].name,
        shape=tuple(logits.shape),
        torch=torch.__version__,
        device=str(tokens.device),
    )


def check_expected(text: str) -> str:
    """A digest as the user gave it, in lower case.

    Raises:
        ConfigError: It is not 64 hexadecimal digits.
    """
    wanted = text.strip().lower()
    if len(wanted) != HEX_DIGITS or set(wanted) - set("0123456789abcdef"):
        raise ConfigError(
            f"--expect {text!r} is no digest: {HEX_DIGITS} hexadecimal digits are needed, "
            f"{len(wanted)} characters were given.\n"
            "Copy the line `digest` that healpass fingerprint prints on the other machine."
        )
    return wanted
