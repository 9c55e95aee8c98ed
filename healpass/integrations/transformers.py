"""HEAL for transformers: one call that sets a model up, and the cache that generation needs.

Layer: integrations. Imports `config` and `errors`.

A pass over the graph keeps activations in FP32 between kernels, but it cannot widen a key/value
cache that the caller owns: `generate` makes a cache of the model's dtype, and a BF16 cache rounds
every key and value to 8 bits. `HealCache` stores integers of 16 or 24 bits, or FP32.
`heal_model(model)` compiles every way into the model (`entries(model)` lists them), gives it
HEAL's attention and lets `generate` use that cache. `unheal_model(model)` takes all of it back.

`CompileConfig(backend="heal", mode=None, options={...})` works as well, but `generate` compiles
with it only the decode step, and only on accelerators: the prefill stays uncompiled. Prefer
`heal_model`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from healpass.config import HealConfig
from healpass.errors import ConfigError, missing_extra

try:
    from transformers import GenerationMixin, PreTrainedModel
except ImportError as error:
    raise missing_extra("healpass.integrations.transformers", "hf", error) from error

from healpass.integrations.attention import register
from healpass.integrations.border import Border, CallBorder
from healpass.integrations.cache import HealCache
from healpass.integrations.entries import methods_of, modules_of
from healpass.integrations.entry import CALL, Entry
from healpass.integrations.frequencies import Pinned, pin
from healpass.integrations.generation import prepare_cache, refuse_continuous_batching

__all__ = ["HealCache", "entries", "heal_model", "register", "unheal_model"]

#: Where a model keeps what `heal_model` has done to it.
RECORD = "_healpass"


class Healed:
    """What `heal_model` has done to a model: enough to list it, to copy it and to undo it.

    Attributes:
        entries: Name -> the compiled entry.
        attention: Each configuration, and the implementation of attention that it had.
        replaced: (module, attribute) of the methods that were replaced for `generate`.
        frequencies: Of rotary embeddings, where `exact` replaced them.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.attention: list[tuple[Any, Any]] = []
        self.replaced: list[tuple[Any, str]] = []
        self.frequencies: list[Pinned] = []

    def undo(self) -> None:
        """Put everything back."""
        for entry in self.entries.values():
            entry.remove()
        for config, name in self.attention:
            config._attn_implementation_internal = name
        for module, name in self.replaced:
            vars(module).pop(name, None)
        for pinned in self.frequencies:
            pinned.undo()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickled model is loaded in a process that may not know HEAL's attention."""
        vars(self).update(state)
        register()


def options_of(
    config: HealConfig | Mapping[str, Any] | None, options: Mapping[str, Any]
) -> HealConfig:
    """What `heal_model` is asked for; a model's results are FP32 unless `outputs` is given."""
    found = HealConfig.read(config, **options)
    return found if found.outputs else dataclasses.replace(found, outputs="fp32")


def heal_model(
    model: Any, config: HealConfig | Mapping[str, Any] | None = None, /, **options: Any
) -> Any:
    """Compile a transformers model with HEAL, in place: arithmetic, attention, mask and cache.

    The model stays the object it was (a `PreTrainedModel`, so Trainer, PEFT and evaluation
    harnesses accept it). Where the caller of `generate`, or of the model, passes no cache,
    `HealCache` takes the place of the one that transformers would have made. Logits are handed out
    in FP32 (unless `outputs="traced"` is given): rounded to BF16, the best two tokens often tie.
    Whatever else leads into the model is compiled as well: `entries(model)` lists it. Copies and
    pickles of the model are healed, too. Another call replaces the first. With `exact`, the
    frequencies of rotary embeddings, which torch's power made, are computed again by
    `frequencies.pin`; a warning lists those that cannot be.

    Args:
        model: A `PreTrainedModel`; or a `PeftModel` or a `SentenceTransformer` around one; not the
            result of `torch.compile`.
        config: A `healpass.HealConfig` or a mapping of its fields.
        **options: The fields by name, as `precision="layercast"`; `outputs` is `"fp32"` unless
            it is given. `kv` decides the cache's format too: None is INT16 with
            `precision="heal"`, FP32 with `layercast`.

    Returns:
        The same model.

    Raises:
        ConfigError: The model is of another kind, or an option is wrong.
    """
    wanted = options_of(config, options)
    bases, tuners = _roots(model)
    unheal_model(model)
    for base in bases:
        record = Healed()
        vars(base)[RECORD] = record
        _compile(record, base, wanted)
        if wanted.rewrites:
            _set_attention(record, base)
            _hook_generation(record, base, wanted)
        if wanted.precision == "exact":
            _pin_frequencies(record, base)
    for name, tuner in tuners:
        vars(bases[0])[RECORD].entries[name] = Entry(tuner, CALL, wanted)
    return model


def unheal_model(model: Any) -> Any:
    """Take back all that `heal_model` has done: the model computes as transformers left it.

    Args:
        model: What was given to `heal_model`. A model that was never healed stays as it is.

    Returns:
        The same model.

    Raises:
        ConfigError: The model is of another kind.
    """
    for base in _roots(model)[0]:
        record = vars(base).pop(RECORD, None)
        if record is not None:
            record.undo()
    return model


def entries(model: Any) -> list[str]:
    """The ways into a healed model that are compiled, each when it is first used.

    Args:
        model: What was given to `heal_model`.

    Returns:
        `"T5ForConditionalGeneration"` for the model's own call, `"encoder"` for the call of a part
        by its name, `"get_image_features"` or `"model.get_image_features"` for a method. Empty if
        the model is not healed.

    Raises:
        ConfigError: The model is of another kind.
    """
    records = [vars(base).get(RECORD) for base in _roots(model)[0]]
    return [name for record in records if record for name in record.entries]


def _compile(record: Healed, base: Any, options: HealConfig) -> None:
    """Make the entries of a model; nothing is compiled before they are used."""
    for name, module in modules_of(base):
        models = options.rewrites and isinstance(module, PreTrainedModel)
        label = name or type(base).__name__
        record.entries[label] = Entry(
            module, CALL, options, CallBorder(options) if models else None
        )
        for method in methods_of(type(module)):
            path = f"{name}.{method}" if name else method
            record.entries[path] = Entry(module, method, options, Border() if models else None)


def _set_attention(record: Healed, base: Any) -> None:
    models = [part for part in base.modules() if isinstance(part, PreTrainedModel)]
    configs = {id(config): config for part in models for config in _configs(part.config)}
    record.attention = [(c, c._attn_implementation_internal) for c in configs.values()]
    if base._can_set_attn_implementation():
        register()
        base.set_attn_implementation("heal")


def _pin_frequencies(record: Healed, base: Any) -> None:
    record.frequencies, kept = pin(base)
    if kept:
        lines = "\n".join(f"- {name}: {reason}" for name, reason in kept.items())
        warnings.warn(
            f"precision='exact' leaves {len(kept)} tables of frequencies as they are:\n{lines}\n"
            "The graph's bits are the same everywhere for these frequencies; torch's power, which "
            "makes them, may round its last bit otherwise on another processor. Save them, or "
            "compare with healpass fingerprint.",
            stacklevel=3,
        )


def _configs(config: Any) -> list[Any]:
    """A configuration and those inside it."""
    inside = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(c for part in inside if part is not None for c in _configs(part))]


def _hook_generation(record: Healed, base: Any, options: HealConfig) -> None:
    """Give every part that generates the caches of HEAL.

    The methods are replaced on these objects; the classes, and every other model, stay as they
    are.
    """
    for part in base.modules():
        if isinstance(part, GenerationMixin):
            hooks = {
                "_prepare_cache_for_generation": functools.partial(prepare_cache, part, options),
                "init_continuous_batching": functools.partial(refuse_continuous_batching, part),
            }
            vars(part).update(hooks)
            record.replaced += [(part, name) for name in hooks]


def _roots(model: Any) -> tuple[list[Any], list[tuple[str, Any]]]:
    """The models of transformers, and what else has to be compiled, by name.

    PEFT wraps a model in a tuner (LoRA), which calls the model's `forward` and not the model, so
    that compiling the model alone would leave training uncompiled; `generate` calls the model.
    """
    if isinstance(model, PreTrainedModel):
        return [model], []
    peft = sys.modules.get("peft")  # whoever has a PeftModel has imported it
    if peft is not None and isinstance(model, peft.PeftModel):
        base, tuner = model.get_base_model(), model.base_model
        return [base], [] if tuner is base else [(type(tuner).__name__, tuner)]
    sentences = sys.modules.get("sentence_transformers")
    if sentences is not None and isinstance(model, sentences.SentenceTransformer):
        return _sentence_roots(model)
    raise ConfigError(
        f"heal_model needs a transformers PreTrainedModel, a PeftModel or a SentenceTransformer, "
        f"got {type(model).__name__}. Pass the model itself, before torch.compile; for other "
        "modules use torch.compile(model, backend='heal')."
    )


def _sentence_roots(model: Any) -> tuple[list[Any], list[tuple[str, Any]]]:
    """The models inside a SentenceTransformer, and its own layers behind them (Dense)."""
    bases: list[Any] = []
    for part in model.modules():
        inside = any(part in base.modules() for base in bases)
        if isinstance(part, PreTrainedModel) and not inside:
            bases.append(part)
    if not bases:
        raise ConfigError(
            "heal_model was given a SentenceTransformer without a model of transformers inside "
            f"(its modules: {', '.join(type(m).__name__ for m in model)}). Use "
            "torch.compile(module, backend='heal') for its modules."
        )
    layers = [
        (name, part)
        for name, part in model.named_children()
        if not any(base in part.modules() for base in bases)
        and next(part.parameters(), None) is not None
    ]
    return bases, layers
