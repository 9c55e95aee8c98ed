"""What the contenders do while the clock runs: prefill, decode, training, attention, compiling.

Layer: bench. Imports `bench.subject` and `errors`. A workload is a small record; `prepare` builds
it inside a contender's process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from healpass.bench.source import SHAPES, ModelSource, ShapesSource, Source
from healpass.bench.subject import ROOM, Subject
from healpass.errors import ConfigError, suggestion

#: Different inputs of one shape that the gate looks at: one alone may be lucky.
INPUTS = 8
#: Decode steps per timed round.
STEPS = 16
#: Gradient elements per parameter that the gate looks at.
SAMPLED = 4096


@dataclass(frozen=True)
class Prepared:
    """A workload in a contender's process.

    Attributes:
        run: What is timed.
        outputs: Computes what the gate compares; not timed.
        calls: How many calls of the model one `run` makes.
        reset: Brings back the state before a `run`; not timed.
    """

    run: Callable[[], Any]
    outputs: Callable[[], Tensor]
    calls: int = 1
    reset: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Workload:
    """What is done, with how many rows or tokens; its name is the table's."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        """`prefill 128`."""
        return f"{self.kind} {self.size}"

    def prepare(self, subject: Subject) -> Prepared:
        """Build it for one contender."""
        return _PREPARE[self.kind](subject, self.size)


def workloads(kinds: tuple[str, ...], source: Source) -> tuple[Workload, ...]:
    """The workloads of the kinds asked for, in the order they run.

    Args:
        kinds: Of `KINDS`, as `decode`; or with the tokens or rows, as `prefill:16`.
        source: A model, or layers, which know other kinds.

    Raises:
        ConfigError: There is no such kind, or a size is not a number above 0.
    """
    sizes = MODEL_SIZES if isinstance(source, ModelSource) else SHAPE_SIZES
    planned = []
    for asked in kinds:
        kind, colon, size = asked.partition(":")
        if kind not in KINDS:
            raise ConfigError(
                f"--what {kind!r} is not one of {', '.join(KINDS)}.{suggestion(kind, KINDS)}"
            )
        if colon and not (size.isdecimal() and int(size)):
            raise ConfigError(
                f"--what {asked!r}: a number of tokens or rows above 0 is needed after the colon, "
                "as prefill:16."
            )
        known = sizes.get(kind, ())
        planned += [Workload(kind, int(n)) for n in ((size,) if colon and known else known)]
    return tuple(planned)


#: Tokens per kind for a model; rows per kind for the layers of `--shapes`.
MODEL_SIZES = {
    "decode": (128,),
    "prefill": (16, 128, 512),
    "train": (64,),
    "attention": (512, 2048),
    "compile": (1,),
}
SHAPE_SIZES = {"decode": (1, 8), "prefill": (64, 512), "attention": (512, 2048)}
KINDS = tuple(MODEL_SIZES)


def tokens(subject: Subject, count: int, seed: int) -> Tensor:
    """Random token ids `[1, count]`, the same in every process.

    Args:
        subject: Whose vocabulary and device are taken.
        count: Number of tokens.
        seed: Of torch's generator.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = subject.config.vocab_size
    return torch.randint(vocabulary, (1, count), generator=generator).to(subject.device)


def _prefill(subject: Subject, size: int) -> Prepared:
    if subject.config is None:
        return _layers(subject, size)

    def run(seed: int = 0) -> Tensor:
        return subject.step(tokens(subject, size, seed))

    def outputs() -> Tensor:
        rows = []
        for seed in range(INPUTS):
            subject.cache.reset()
            rows.append(run(seed).clone())
        return torch.cat(rows)

    return Prepared(run, outputs, reset=subject.cache.reset)


def _decode(subject: Subject, size: int) -> Prepared:
    if subject.config is None:
        return _layers(subject, size)
    stream = tokens(subject, ROOM, seed=0).split(1, dim=1)
    context = torch.cat(stream[:size], dim=1)

    def advance(count: int) -> list[Tensor]:
        return [subject.step(token).clone() for token in stream[size : size + count]]

    def rewind() -> None:
        subject.cache.reset()
        subject.step(context)

    def outputs() -> Tensor:
        rewind()
        return torch.cat(advance(INPUTS))

    return Prepared(lambda: advance(STEPS), outputs, STEPS, rewind)


def activations_of(subject: Subject, size: int) -> list[Tensor]:
    """An activation `[M, K]` per layer, in the contender's dtype, from the same FP32 numbers.

    Args:
        subject: Whose layers, dtype and device are taken.
        size: M.
    """
    generator = torch.Generator().manual_seed(size)
    module: Any = subject.module
    widths = [layer.weight.shape[1] for layer in module.layers]
    made = [torch.randn(size, width, generator=generator) for width in widths]
    return [x.to(subject.device, subject.activation_dtype) for x in made]


def states_of(subject: Subject, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[1, H, L, E]` in the contender's dtype, from the same BF16 numbers.

    Args:
        subject: Whose heads, dtype and device are taken.
        size: L.
    """
    generator = torch.Generator().manual_seed(size)
    heads = subject.heads
    query, key, value = (
        torch.randn(1, count, size, heads.size, generator=generator)
        .to(torch.bfloat16)
        .to(subject.device, subject.activation_dtype)
        for count in (heads.queries, heads.keys, heads.keys)
    )
    return query, key, value


def _layers(subject: Subject, size: int) -> Prepared:
    """Linear layers alone, `size` rows each."""
    if subject.contender.attention == "flash":
        raise _nothing_new(subject, "linear layers have no attention")
    activations = activations_of(subject, size)
    multiply = subject.compile(subject.module)

    def outputs() -> Tensor:
        return torch.cat([product.flatten() for product in multiply(*activations)])

    return Prepared(lambda: multiply(*activations), outputs)


def _train(subject: Subject, size: int) -> Prepared:
    if subject.contender.is_triton:
        raise _nothing_new(subject, "its kernel has no gradient")
    model: Any = subject.module

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])

    compiled = subject.compile(loss)

    def run(seed: int = 0) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            value = compiled(tokens(subject, size, seed))
        value.backward()
        return value

    def outputs() -> Tensor:
        run()
        return torch.cat([p.grad.flatten()[:SAMPLED] for p in model.parameters()])

    return Prepared(run, outputs)


def _attention(subject: Subject, size: int) -> Prepared:
    if subject.contender.is_triton:
        raise _nothing_new(subject, "attention has no linear layer")
    query, key, value = states_of(subject, size)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    compiled = subject.compile(attend)
    return Prepared(lambda: compiled(query, key, value), lambda: compiled(query, key, value))


def _nothing_new(subject: Subject, why: str) -> ConfigError:
    """What a contender's row says of a workload in which it would be another contender."""
    name = subject.contender.name
    return ConfigError(f"{name} has nothing to measure here: {why}; leave it out of --contenders")


def _compile(subject: Subject, size: int) -> Prepared:
    """A decode step's first call: tracing, passes and code generation, nothing from a cache."""
    token = tokens(subject, size, seed=0)
    return Prepared(
        lambda: subject.step(token), lambda: subject.step(token), reset=subject.cache.reset
    )


_PREPARE: dict[str, Callable[[Subject, int], Prepared]] = {
    "prefill": _prefill,
    "decode": _decode,
    "train": _train,
    "attention": _attention,
    "compile": _compile,
}

__all__ = ["KINDS", "SHAPES", "Prepared", "ShapesSource", "Workload", "workloads"]
