"""The options of a compile, parsed once and strictly. Imports `errors` only.

`torch.compile` does not check the options of a backend it does not know, so every mistake is
caught here: an unknown name, a wrong type, a value outside its choices, or a combination without
meaning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from healpass.errors import ConfigError, suggestion

Precision = Literal["heal", "layercast", "exact", "traced", "fp32", "fp16", "bf16"]
KVFormat = Literal["int16", "int24", "fp32"]
Outputs = Literal["traced", "fp32"]
Generation = Literal["v100", "a100", "h100", "b200"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite"]

Accuracy = Literal["low", "default", "high"]

#: `exact_accuracy` -> the digit products it stands for (`products.exact` has their bounds).
DIGIT_PRODUCTS: dict[str, int] = {"low": 3, "default": 5, "high": 8}
#: Precisions that leave the graph as it came; the dtypes say that the model has that one.
UNTOUCHED = ("traced", "fp32", "fp16", "bf16")

CHOICES: dict[str, tuple[Any, ...]] = {
    "precision": get_args(Precision),
    "kv": (None, *get_args(KVFormat)),
    "outputs": (None, *get_args(Outputs)),
    "mode": (None, *get_args(Mode)),
    "simulate": (None, *get_args(Generation)),
    "exact_accuracy": get_args(Accuracy),
    "exact_products": (None, 3, 5, 6, 8),
}


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"disable={value!r}: a tuple of pass names is needed, as ('promote',).")
    return tuple(value)


def _check_fields(options: Any) -> None:
    for option in dataclasses.fields(options):
        _check_type(option.name, getattr(options, option.name), option.default)
        _check_choice(option.name, getattr(options, option.name))


def _check_type(name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: True or False is needed.")
    if type(default) is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{name}={value!r}: a whole number is needed.")


def _check_choice(name: str, value: Any) -> None:
    choices = CHOICES.get(name)
    if choices is None or any(type(value) is type(one) and value == one for one in choices):
        return
    raise ConfigError(
        f"{name}={value!r} is not one of {', '.join(map(repr, choices))}."
        + suggestion(str(value), [str(choice) for choice in choices])
    )


@dataclass(frozen=True, kw_only=True)
class Debug:
    """For studies and for looking for a fault; nothing that a model is run with.

    Raises:
        ConfigError: A value has the wrong type or is not among its choices.
    """

    simulate: Generation | None = None
    """Run matmuls on CPU as the tensor cores of this GPU generation would; `layercast`, which uses
    none, runs a chain of FP32 multiply-adds."""
    order: int = 0
    """Seed of another order of summation (the study's stand-in for another GPU)."""
    disable: tuple[str, ...] = field(default=())
    """Names of passes to leave out, for bisecting."""

    def __post_init__(self) -> None:
        """Check types and choices."""
        object.__setattr__(self, "disable", _names(self.disable))
        _check_fields(self)
        if self.order < 0:
            raise ConfigError(f"order={self.order}: a seed of 0 or more is needed.")


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """What `torch.compile(model, backend="heal", options={...})` is asked to do.

    Raises:
        ConfigError: A value has the wrong type or is not among its choices.
    """

    precision: Precision = "heal"
    """Arithmetic of matmuls and attention. `traced` leaves the graph as it came; so do `fp32`,
    `fp16` and `bf16`, which refuse a model that computes in another 16-bit dtype: nothing is
    cast."""
    kv: KVFormat | None = None
    """Format of Q, K and V in attention. None: that of a HealCache in the graph, else `int16` for
    `heal` and `exact`, which needs integers, and `fp32` for `layercast`. With `int24` and `fp32`
    results of `heal` are FP32-equivalent end to end; `int16` is coarser, and finer than a BF16
    cache (`python examples/attention_accuracy.py` prints by how much)."""
    outputs: Outputs | None = None
    """`traced` keeps the dtype the caller expects (None: so does `torch.compile`, while
    `heal_model` means `fp32`); `fp32` hands what the compiled function returns
    (logits, hidden states, losses) out in FP32, all but keys, values and recurrent states of the
    caller's own. Code after a graph break gets the traced dtypes."""
    mode: Mode | None = None
    """An Inductor mode. It stands here because torch forbids `mode=` beside `options=`."""
    exact_accuracy: Accuracy = "default"
    """How accurate `precision="exact"` is; the same bits everywhere in any case. `low`, `default`
    and `high` are 3, 5 and 8 digit products: more cost more."""
    exact_products: int | None = None
    """For experts, in the place of `exact_accuracy`: the number of digit products, 3, 5, 6 or 8;
    with FP32 weights 5 means 6."""
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
    debug: Debug = field(default=Debug())
    """A `Debug`, or a mapping of its fields: simulated GPUs, orders of summation, passes left
    out."""

    def __post_init__(self) -> None:
        """Check types, choices and combinations."""
        object.__setattr__(self, "debug", _debug(self.debug))
        _check_fields(self)
        _check_combinations(self)

    @classmethod
    def read(cls, options: HealConfig | Mapping[str, Any] | None = None, /, **more: Any) -> Self:
        """The configuration that a caller gives, in any of the ways to give one.

        Args:
            options: A configuration, or a mapping whose keys are the fields of this class. A
                field of `Debug` may stand among them by its own name.
            **more: The same by keywords; a `mode` of None is not given.

        Raises:
            ConfigError: An option is unknown (the nearest name is suggested), or given twice.
        """
        if not isinstance(options, (HealConfig, Mapping, type(None))):
            raise ConfigError(
                f"options are given as a healpass.HealConfig, a dict or keywords, not as a "
                f"{type(options).__name__}.\nAs in healpass.explain(model, precision='exact')"
                "(*inputs): what the model is called with comes in the second brackets."
            )
        given = _changed(options) if isinstance(options, HealConfig) else dict(options or {})
        given = {name: value for name, value in given.items() if (name, value) != ("mode", None)}
        given, more = _with_debug(given), _with_debug(more)
        _check_known(cls, [*given, *more])
        for name, value in more.items():
            if name == "mode" and value is None:
                continue
            if given.get(name, value) != value:
                raise ConfigError(
                    f"{name}={value!r} and options[{name!r}]={given[name]!r} contradict each "
                    "other. Give one of them."
                )
            given[name] = value
        return cls(**given)

    def changed(self) -> dict[str, Any]:
        """The options that are not at their default, as what JSON knows."""
        return {
            name: dataclasses.asdict(value) if isinstance(value, Debug) else value
            for name, value in _changed(self).items()
        }

    @property
    def rewrites(self) -> bool:
        """Whether the graph is changed at all."""
        return self.precision not in UNTOUCHED

    @property
    def numerics(self) -> str:
        """The `numerics` argument of the `heal::` operators (`products.numerics` reads it)."""
        products = self.digit_products if self.precision == "exact" else ""
        last = "m_invariant" if self.m_invariant else ""
        simulate, order = self.debug.simulate or "", self.debug.order or ""
        return f"{self.precision}{products}:{simulate}:{order}:{last}".rstrip(":")

    @property
    def digit_products(self) -> int:
        """How many digit products `precision="exact"` takes."""
        return self.exact_products or DIGIT_PRODUCTS[self.exact_accuracy]

    @property
    def attention_format(self) -> str:
        """Format of Q, K and V where no cache in the graph has one of its own."""
        return self.kv or ("fp32" if self.precision == "layercast" else "int16")

    def key(self) -> str:
        """Canonical JSON of every option: part of the compile caches' keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def _changed(config: HealConfig) -> dict[str, Any]:
    """The fields of a configuration that are not at their default."""
    values = {option.name: getattr(config, option.name) for option in dataclasses.fields(config)}
    defaults = {option.name: option.default for option in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def _check_known(cls: type, names: Sequence[str]) -> None:
    known = [option.name for option in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            kind = "debug option" if cls is Debug else "option"
            raise ConfigError(
                f"unknown {kind} {name!r} for backend='heal'.{suggestion(str(name), known)}\n"
                f"Known options: {', '.join(known)}. Inductor's own options are not accepted "
                "here, because some of them change results."
            )


def _with_debug(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the debug options among them where they belong.

    Raises:
        ConfigError: One is given by its own name and otherwise in the group.
    """
    known = [option.name for option in dataclasses.fields(Debug)]
    named = {name: given[name] for name in known if name in given}
    rest = {name: value for name, value in given.items() if name not in named}
    if not named and "debug" not in rest:
        return rest
    group, default = _debug(rest.get("debug", {})), Debug()
    found = dataclasses.replace(group, **named)
    for name in named:
        if getattr(group, name) not in (getattr(default, name), getattr(found, name)):
            raise ConfigError(
                f"{name}={named[name]!r} and debug={rest['debug']!r} contradict each other. "
                "Give one of them."
            )
    return {**rest, "debug": found}


def _debug(value: Any) -> Debug:
    if isinstance(value, Debug):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"debug={value!r}: a dict is needed, as {{'disable': ('promote',)}}.")
    _check_known(Debug, list(value))
    return Debug(**value)


def _check_combinations(config: HealConfig) -> None:
    if not config.rewrites and (config.debug.simulate or config.debug.order or config.m_invariant):
        raise ConfigError(
            "simulate, order and m_invariant need a precision that rewrites matmuls, but "
            f"precision={config.precision!r} leaves them as they are. Use precision='heal' or "
            "'layercast'."
        )
    if config.precision == "exact" and config.kv == "fp32":
        raise ConfigError(
            "kv='fp32' contradicts precision='exact': its sums over Q, K and V are integer sums, "
            "which have one value in any order.\nUse kv='int16' (the default there) or 'int24'."
        )
    _check_exact_accuracy(config)


def _check_exact_accuracy(config: HealConfig) -> None:
    names = ("exact_accuracy", "exact_products")
    asked = {name: value for name, value in _changed(config).items() if name in names}
    if config.precision != "exact":
        for name, value in asked.items():
            raise ConfigError(
                f"{name}={value!r} needs precision='exact', but precision={config.precision!r} "
                "multiplies no digits. Leave it out, or use precision='exact'."
            )
    if len(asked) == 2:
        raise ConfigError(
            f"exact_accuracy={config.exact_accuracy!r} and exact_products={config.exact_products} "
            "say the same thing twice. Give one of them."
        )
