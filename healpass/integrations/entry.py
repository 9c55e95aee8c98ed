"""One way into a model, compiled as a whole: its call, or one of its methods.

Layer: integrations. Imports `watch`.

`model.compile()` is not enough, for three reasons.

- Dynamo remembers by code object what it could not trace. The frame that it compiles is one of
  transformers' wrappers, which all models share; so a mistake that raises while it traces (two
  inputs that exclude each other) makes it skip that wrapper for good, in all models, and what the
  wrapper calls is compiled in fragments. Here every entry has a code object of its own, and after
  an error the frames that it went through are taken up again (`uncompiled.Region`).
- Its frame does not notice that Dynamo has given it up. Ours does: `is_compiling()` is true where
  Dynamo traces the frame and false where Python runs it.
- `generate` calls parts of a model by themselves, and hands what one hands out to another. An
  entry hands out FP32, so an entry takes FP32 for the model's own dtype: the cast is part of the
  graph, where HEAL drops it.

Within another entry that is being traced, an entry is inlined. Within another that torch runs in
fragments it keeps the traced dtypes, for the fragment that reads them was traced with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.utils import counters

from healpass import watch
from healpass.config import HealConfig

#: The name of the entry that is the module's call.
CALL = "__call__"
#: Ends of the names of keyword arguments that hold what another entry may have handed out.
STATES = ("embeds", "embeddings", "hidden_states", "hidden_state", "features", "outputs")
#: What Dynamo counts when the program that it traces raises.
RAISED = "Observed exception"

#: While an entry runs: how many exceptions Dynamo had observed when it began.
_running: ContextVar[int | None] = ContextVar("the entry that is running", default=None)


class Entry:
    """A callable that stands for one way into a module, and compiles it at its first call.

    It lies in the module's `_compiled_call_impl`, or, for a method, in the module's `__dict__`
    under the method's name. It can be copied and pickled with its module; what was compiled stays
    behind.

    Args:
        owner: The module.
        name: `CALL`, or the name of a method.
        config: Options of the backend.
        border: Looks at what crosses the border of an outermost call: `before` takes the owner,
            positional and keyword arguments and returns the arguments to go on with, or raises
            what is wrong with them; `after` takes the owner and the result.
    """

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        config: HealConfig,
        border: Any = None,
    ) -> None:
        self.owner, self.name, self.config, self.border = owner, name, config, border
        self.place = "_compiled_call_impl" if name == CALL else name
        self.previous = {k: v for k, v in vars(owner).items() if k == self.place}
        self.compiled: dict[Any, Callable[..., Any]] = {}
        vars(owner)[self.place] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module compiled; inline it where Dynamo is tracing."""
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        inner = _running.get() is not None
        border = None if inner else self.border
        if border is not None:
            args, kwargs = border.before(self.owner, args, kwargs)
        function = self._function(inner)
        token = _running.set(count_raised())
        try:
            result = function(self.owner, *args, **kwargs)
        finally:
            _running.reset(token)
        if border is not None:
            border.after(self.owner, result)
        return result

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does without this entry."""
        return self.target()(self.owner, *args, **kwargs)

    def target(self) -> Callable[..., Any]:
        """The function behind the entry; it takes the owner first."""
        if self.name == CALL:
            return _call
        return _dropping_owner(self.previous[self.name]) if self.previous else self._method()

    @property
    def __wrapped__(self) -> Any:
        """What stood here before: `generate` reads the signature of what it calls."""
        if self.previous and self.name != CALL:
            return self.previous[self.name]
        name = "_call_impl" if self.name == CALL else self.name
        return getattr(type(self.owner), name).__get__(self.owner)

    def _method(self) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(type(self.owner), self.name)
        return method

    def remove(self) -> None:
        """Put back what was there before, unless somebody has put something else there since."""
        if vars(self.owner).get(self.place) is self:
            del vars(self.owner)[self.place]
            vars(self.owner).update(self.previous)

    def _function(self, inner: bool) -> Callable[..., Any]:
        config = dataclasses.replace(self.config, outputs="traced") if inner else self.config
        key = (inner, parameter_dtype(self.owner))
        if key not in self.compiled:
            self.compiled[key] = compile_entry(_framed(self, key[1]), config)
        return self.compiled[key]

    def given_up(self, *args: Any, **kwargs: Any) -> Any:
        """Go on where Dynamo has given up the frame of this entry.

        Where the program raised while it was traced, it is run without Dynamo, so that it raises
        again, as the user's own error. What goes on without an error is refused or told by the
        record of the region (`healpass.uncompiled`).
        """
        if count_raised() > (_running.get() or 0):
            return torch.compiler.disable(self.plain)(*args, **kwargs)
        return self.plain(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was compiled."""
        return vars(self) | {"compiled": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the place in the module again: a copied module forgets `_compiled_call_impl`."""
        vars(self).update(state)
        if self.name == CALL:
            vars(self.owner)[self.place] = self


@torch.compiler.disable  # Dynamo, at work around an entry in fragments, has no business in here
def compile_entry(function: Callable[..., Any], config: HealConfig) -> Callable[..., Any]:
    """Compile the frame of one entry, with a limit of graphs and a record of its own."""
    compiled: Callable[..., Any] = torch.compile(
        function, backend="heal", dynamic=True, options=config.changed(), **watch.compile_limits()
    )
    watch.attach(watch.context_of(compiled))
    return compiled


def _framed(entry: Entry, dtype: torch.dtype | None) -> Callable[..., Any]:
    """A function with a code object of its own, which Dynamo compiles and guards by itself."""
    target, given_up = entry.target(), entry.given_up

    def run(owner: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return given_up(*args, **kwargs)
        if dtype is not None:
            args = narrowed(args, dtype)
            kwargs = {
                k: narrowed(v, dtype) if k.endswith(STATES) else v for k, v in kwargs.items()
            }
        return target(owner, *args, **kwargs)

    name = f"{type(entry.owner).__name__}_{entry.name.strip('_')}"
    run.__code__ = run.__code__.replace(co_name=name)
    return run


def _call(owner: Any, /, *args: Any, **kwargs: Any) -> Any:
    return owner._call_impl(*args, **kwargs)


def _dropping_owner(bound: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _owner, /, *args, **kwargs: bound(*args, **kwargs)


def narrowed(value: Any, dtype: torch.dtype) -> Any:
    """The same with FP32 tensors in another dtype; caches and all else as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype == torch.float32 else value
    if type(value) in (tuple, list):
        return type(value)(narrowed(item, dtype) for item in value)
    if isinstance(value, dict):  # ModelOutput is one
        return type(value)(**{name: narrowed(item, dtype) for name, item in value.items()})
    return value


def parameter_dtype(owner: nn.Module) -> torch.dtype | None:
    """The 16-bit dtype of a module's parameters, None if they are wider, or there are none."""
    for parameter in owner.parameters():
        if parameter.is_floating_point():
            return parameter.dtype if parameter.dtype.itemsize == 2 else None
    return None


def count_raised() -> int:
    """How often Dynamo has seen the program that it traces raise."""
    reasons = counters["unimplemented"] + counters["graph_break"]
    return sum(count for reason, count in reasons.items() if str(reason).startswith(RAISED))


# Where torch runs a model in fragments it meets these frames: they are no part of the model.
for _function in (Entry.__call__, Entry.given_up):
    eval_frame.skip_code(_function.__code__)
