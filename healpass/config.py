"""The options of a compile, parsed once and strictly. Imports `errors` only.

`torch.compile` does not check the options of a backend it does not know, so every mistake is
caught here: an unknown name, a wrong type, a value outside its choices, or a combination without
meaning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from healpass.errors import ConfigError, suggestion

Precision = Literal["heal", "layercast", "exact", "fp32", "fp16", "bf16"]
KVFormat = Literal["int16", "int24", "fp32"]
Outputs = Literal["traced", "fp32"]
Generation = Literal["v100", "a100", "h100", "b200"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite"]

#: Precisions that rewrite nothing: the baselines of the study run the graph as it was traced.
BASELINES = ("fp32", "fp16", "bf16")

CHOICES: dict[str, tuple[Any, ...]] = {
    "precision": get_args(Precision),
    "kv": (None, *get_args(KVFormat)),
    "outputs": get_args(Outputs),
    "mode": (None, *get_args(Mode)),
    "simulate": (None, *get_args(Generation)),
    "exact_products": (3, 5, 6, 8),
}


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """What `torch.compile(model, backend="heal", options={...})` is asked to do.

    Raises:
        ConfigError: A value has the wrong type or is not among its choices.
    """

    precision: Precision = "heal"
    """Arithmetic of matmuls and attention; `fp32`, `fp16` and `bf16` run the graph as traced."""
    kv: KVFormat | None = None
    """Format of Q, K and V in attention. None: that of a HealCache in the graph, else `int16` for
    `heal` and `exact`, which needs integers, and `fp32` for `layercast`. With `int24` and `fp32`
    results of `heal` are FP32-equivalent end to end; `int16` is fifty times coarser, and
    twenty-five times finer than a BF16 cache."""
    outputs: Outputs = "traced"
    """`traced` keeps the dtype the caller expects; `fp32` hands what the compiled function returns
    (logits, hidden states, losses) out in FP32, all but keys, values and recurrent states of the
    caller's own. Code after a graph break gets the traced dtypes."""
    mode: Mode | None = None
    """An Inductor mode. It stands here because torch forbids `mode=` beside `options=`."""
    simulate: Generation | None = None
    """Run matmuls on CPU as the tensor cores of this GPU generation would; `layercast`, which uses
    none, runs a chain of FP32 multiply-adds."""
    order: int = 0
    """Seed of another order of summation (the study's stand-in for another GPU)."""
    exact_products: int = 5
    """Digit products of `precision="exact"`: more cost more and are more accurate; with FP32
    weights 5 means 6."""
    prepack: bool = False
    """Convert frozen BF16 weights once to FP16 with a power of two per channel. The model's own
    weights stay, so this holds them twice (a warning says how much); off by default."""
    autotune: bool = False
    """Let Inductor time the tile shapes of the CUDA templates. Results do not change, only
    speed."""
    m_invariant: bool = False
    """Same bits on both sides of the border between the CUDA kernels for decode (M <= 16) and for
    prefill: both then add in one order, which costs prefill more products."""
    strict: bool = False
    """Raise StrictError where a matmul or SDPA node has to be kept as it is, and where its CUDA
    template failed its check on this GPU."""
    disable: tuple[str, ...] = field(default=())
    """Names of passes to leave out, for bisecting."""

    def __post_init__(self) -> None:
        """Check types, choices and combinations."""
        object.__setattr__(self, "disable", _names(self.disable))
        for option in dataclasses.fields(self):
            _check_type(option.name, getattr(self, option.name), option.default)
            _check_choice(option.name, getattr(self, option.name))
        _check_combinations(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, mode: str | None) -> HealConfig:
        """Build a configuration from what torch hands to a backend.

        Args:
            options: The `options=` of `torch.compile`, keys being the fields of this class.
            mode: The `mode=` of `torch.compile`.

        Raises:
            ConfigError: An option is unknown (the nearest name is suggested), or `mode` is given
            twice.
        """
        given = dict(options or {})
        known = [option.name for option in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"unknown option {name!r} for backend='heal'.{suggestion(str(name), known)}\n"
                    f"Known options: {', '.join(known)}. Inductor's own options are not accepted "
                    "here, because some of them change results."
                )
        if mode is not None:
            if given.get("mode") not in (None, mode):
                raise ConfigError(
                    f"mode={mode!r} and options['mode']={given['mode']!r} contradict each other. "
                    "Give one of them."
                )
            given["mode"] = mode
        return cls(**given)

    @property
    def rewrites(self) -> bool:
        """Whether the graph is changed at all."""
        return self.precision not in BASELINES

    @property
    def numerics(self) -> str:
        """The `numerics` argument of the `heal::` operators (`products.numerics` reads it)."""
        products = self.exact_products if self.precision == "exact" else ""
        last = "m_invariant" if self.m_invariant else ""
        text = f"{self.precision}{products}:{self.simulate or ''}:{self.order or ''}:{last}"
        return text.rstrip(":")

    @property
    def attention_format(self) -> str:
        """Format of Q, K and V where no cache in the graph has one of its own."""
        return self.kv or ("fp32" if self.precision == "layercast" else "int16")

    def key(self) -> str:
        """Canonical JSON of every option: part of the compile caches' keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"disable={value!r}: a tuple of pass names is needed, as ('promote',).")
    return tuple(value)


def _check_type(name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: True or False is needed.")
    if type(default) is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{name}={value!r}: a whole number is needed.")


def _check_choice(name: str, value: Any) -> None:
    choices = CHOICES.get(name)
    if choices is None or value in choices:
        return
    raise ConfigError(
        f"{name}={value!r} is not one of {', '.join(map(repr, choices))}."
        + suggestion(str(value), [str(choice) for choice in choices])
    )


def _check_combinations(config: HealConfig) -> None:
    if config.order < 0:
        raise ConfigError(f"order={config.order}: a seed of 0 or more is needed.")
    if not config.rewrites and (config.simulate or config.order or config.m_invariant):
        raise ConfigError(
            "simulate, order and m_invariant need a precision that rewrites matmuls, but "
            f"precision={config.precision!r} runs them as traced. Use precision='heal' or "
            "'layercast'."
        )
    if config.precision == "exact" and config.kv == "fp32":
        raise ConfigError(
            "kv='fp32' contradicts precision='exact': its sums over Q, K and V are integer sums, "
            "which have one value in any order.\nUse kv='int16' (the default there) or 'int24'."
        )
    if config.precision != "exact" and config.exact_products != 5:
        raise ConfigError(
            f"exact_products={config.exact_products} needs precision='exact', but precision="
            f"{config.precision!r} multiplies no digits. Leave it out, or use precision='exact'."
        )
