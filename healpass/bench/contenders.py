"""What is compared: a contender is a dtype of weights, a compiler and a format of the cache.

Layer: bench. Imports `errors`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from healpass.errors import ConfigError, suggestion

Compiler = Literal["eager", "inductor", "heal"]

#: What every error is measured against: the eager model in FP64.
REFERENCE = "fp64-eager"


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Attributes:
        name: As the table shows it.
        dtype: Of the weights, as `"bfloat16"`.
        yardstick: The eager contender with the same number formats; the gate allows twice its
            error (see `run.limit`). A contender that is its own yardstick only has to be finite.
        compiler: None at all, plain Inductor, or `backend="heal"`.
        options: Of `backend="heal"`.
        cache: Format of keys and values: that of the weights (`"traced"`), or HealCache's.
        upcast: Whether each linear layer upcasts its weight and multiplies in FP32, as LayerCast's
            published code does (arXiv 2506.09501).
    """

    name: str
    dtype: str
    yardstick: str
    compiler: Compiler = "eager"
    options: dict[str, Any] = field(default_factory=dict)
    cache: str = "traced"
    upcast: bool = False


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
    Contender("layercast-published", "bfloat16", "fp32-eager", cache="fp32", upcast=True),
    _heal("layercast", "fp32-eager", "fp32", precision="layercast"),
    _heal("heal", "int16-eager", "int16"),
    _heal("heal-int24", "fp32-eager", "int24"),
    _heal("heal-fp32", "fp32-eager", "fp32"),
    _heal("exact", "int16-eager", "int16", precision="exact"),
    # Not for show: the meaning that contenders with an INT16 cache are held to, and the reference.
    Contender("int16-eager", "float32", "int16-eager", cache="int16"),
    Contender(REFERENCE, "float64", REFERENCE),
)
CONTENDERS = {contender.name: contender for contender in _ALL}

#: What a run compares if nothing else is asked for.
DEFAULT = (
    "bf16-inductor",
    "fp32-inductor",
    "layercast-published",
    "layercast",
    "heal",
    "heal-fp32",
    "exact",
)


def choose(names: Iterable[str]) -> tuple[Contender, ...]:
    """Look the names up.

    Raises:
        ConfigError: A name is unknown; the nearest is suggested.
    """
    chosen = []
    for name in names:
        if name not in CONTENDERS:
            raise ConfigError(
                f"no contender is called {name!r}.{suggestion(name, CONTENDERS)}\n"
                f"There are: {', '.join(CONTENDERS)}."
            )
        chosen.append(CONTENDERS[name])
    return tuple(chosen)


def judges(chosen: Iterable[Contender]) -> tuple[Contender, ...]:
    """The yardsticks of those chosen, and the reference: they run for the gate's sake."""
    names = dict.fromkeys([*(contender.yardstick for contender in chosen), REFERENCE])
    return tuple(CONTENDERS[name] for name in names)
