"""What is compared: a dtype of weights, a compiler, a format of the cache, a way to multiply.

Layer: bench. Imports `errors`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from healpass.errors import ConfigError, suggestion

Compiler = Literal["eager", "inductor", "heal"]
#: `"upcast"`: the weight is upcast and multiplied in FP32, as LayerCast's published code does
#: (arXiv 2506.09501). The last three are those of `bench.products`.
Linear = Literal["torch", "upcast", "tf32x3", "bf16x6", "invariant"]
Attention = Literal["torch", "flash"]

#: What every error is measured against: the eager model in FP64.
REFERENCE = "fp64-eager"


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Attributes:
        name: As the table shows it.
        dtype: Of the weights, as `"bfloat16"`.
        yardstick: The eager contender with the same number formats; the gate allows twice its
            error, and that of formats that it lacks (see `run.limit`). A contender that is its own
            yardstick only has to be finite.
        compiler: None at all, plain Inductor, or `backend="heal"`.
        options: Of `backend="heal"`.
        cache: Format of keys and values: that of the weights (`"traced"`, or `"growing"` where
            each token makes the cache longer), or HealCache's.
        linear: How linear layers multiply.
        attention: torch's choice among its kernels, or flash attention and nothing else.
    """

    name: str
    dtype: str
    yardstick: str
    compiler: Compiler = "eager"
    options: dict[str, Any] = field(default_factory=dict)
    cache: str = "traced"
    linear: Linear = "torch"
    attention: Attention = "torch"

    @property
    def wide(self) -> bool:
        """Whether activations are FP32 beside 16-bit weights, outside of HEAL too."""
        return self.linear in ("upcast", "tf32x3", "bf16x6")

    @property
    def has_heal_cache(self) -> bool:
        """Whether keys and values lie in a HealCache, not in one of transformers."""
        return self.cache not in ("traced", "growing") and not self.wide

    @property
    def is_triton(self) -> bool:
        """Whether linear layers are Triton kernels of `bench.products`."""
        return self.linear not in ("torch", "upcast")

    @property
    def needs_cuda(self) -> bool:
        """Whether there is no such thing on a CPU."""
        return self.is_triton or self.attention == "flash"


def _heal(name: str, yardstick: str, cache: str, **options: Any) -> Contender:
    options = {"outputs": "fp32", "kv": cache} | options
    return Contender(name, "bfloat16", yardstick, "heal", options, cache)


_ALL = (
    Contender("bf16-eager", "bfloat16", "bf16-eager"),
    Contender("bf16-inductor", "bfloat16", "bf16-eager", "inductor"),
    Contender("fp16-eager", "float16", "fp16-eager"),
    Contender("fp16-inductor", "float16", "fp16-eager", "inductor"),
    Contender("fp32-eager", "float32", "fp32-eager"),
    Contender("fp32-inductor", "float32", "fp32-eager", "inductor"),
    Contender("layercast-published", "bfloat16", "fp32-eager", cache="fp32", linear="upcast"),
    _heal("layercast", "fp32-eager", "fp32", precision="layercast"),
    _heal("heal", "int16-eager", "int16"),
    _heal("heal-int24", "fp32-eager", "int24"),
    _heal("heal-fp32", "fp32-eager", "fp32"),
    _heal("exact", "int16-eager", "int16", precision="exact"),
    Contender("tf32x3", "bfloat16", "fp32-eager", "inductor", cache="fp32", linear="tf32x3"),
    Contender("bf16x6", "bfloat16", "fp32-eager", "inductor", cache="fp32", linear="bf16x6"),
    Contender("bf16-invariant", "bfloat16", "bf16-eager", "inductor", linear="invariant"),
    # Its cache grows: flash attention takes no mask, and a cache with room to spare needs one.
    Contender("bf16-flash", "bfloat16", "bf16-eager", cache="growing", attention="flash"),
    # Not for show: the reference implementation that contenders with an INT16 cache are held to,
    # and the reference.
    Contender("int16-eager", "float32", "int16-eager", cache="int16"),
    Contender(REFERENCE, "float64", REFERENCE),
)
CONTENDERS = {contender.name: contender for contender in _ALL}

#: The precisions, which every device has.
DEFAULT = (
    "bf16-inductor",
    "fp32-inductor",
    "layercast-published",
    "layercast",
    "heal",
    "heal-fp32",
    "exact",
)


def default(device: str) -> tuple[str, ...]:
    """What a run compares if nothing else is asked for: on a GPU, what only GPUs have too."""
    extra = [contender.name for contender in _ALL if contender.needs_cuda]
    return (*DEFAULT, *extra) if device == "cuda" else DEFAULT


def choose(names: Iterable[str], device: str = "cpu") -> tuple[Contender, ...]:
    """Look the names up.

    Raises:
        ConfigError: A name is unknown; the nearest is suggested. Or only a GPU has it.
    """
    chosen = []
    for name in names:
        if name not in CONTENDERS:
            raise ConfigError(
                f"no contender is called {name!r}.{suggestion(name, CONTENDERS)}\n"
                f"There are: {', '.join(CONTENDERS)}."
            )
        if CONTENDERS[name].needs_cuda and device != "cuda":
            raise ConfigError(
                f"--contenders {name} needs --device cuda, and --device {device} was asked for: "
                "it is a kernel that only GPUs have. Leave it out, or run on a GPU."
            )
        chosen.append(CONTENDERS[name])
    return tuple(chosen)


def judges(chosen: Iterable[Contender]) -> tuple[Contender, ...]:
    """The yardsticks of those chosen, and the reference: they run for the gate's sake."""
    names = dict.fromkeys([*(contender.yardstick for contender in chosen), REFERENCE])
    return tuple(CONTENDERS[name] for name in names)
