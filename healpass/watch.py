"""How HEAL notices what torch leaves uncompiled, by torch's own hooks. Imports `uncompiled`.

No setting of torch is touched, and nothing of it replaced:

- `torch._dynamo.callback` calls before and after each frame that is traced; the exception in
  flight after it says why the frame is given up;
- the logger that tells of the limit of graphs: there no frame is traced, so no callback called;
- the hooks that each `torch.compile` region runs around its own calls: there a refusal reaches
  the caller, and there the record of the region hangs.

Which region is at work is read off the stack, since torch shows it nowhere else.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch

from healpass.config import HealConfig
from healpass.errors import ConfigError
from healpass.uncompiled import Region, Uncompiled

#: Kinds of calls that one function may be compiled for where we call `torch.compile` ourselves;
#: torch's own limit of 8 is met by padded and single, scored and generated, trained and tested.
RECOMPILE_LIMIT = 64
#: How the message of torch's logger begins.
LIMIT = "torch._dynamo hit config."

# ------------------------------------------------------------------------------- torch's hooks


class Lookout:
    """What Dynamo calls before it traces a frame; it lives until `torch._dynamo.reset()`."""

    def __call__(self, args: Any) -> None:
        """Tell the region at work, if it is HEAL's."""
        del args
        from torch._dynamo import callback

        if _after_a_frame not in callback.callback_handler.end_callbacks:
            callback.on_compile_end(_after_a_frame)
        region = current_region()
        if region is not None:
            region.begin_frame(self)


def keep_watch() -> None:
    """Register the hooks, again whenever `torch._dynamo.reset()` has dropped all callbacks."""
    from torch._dynamo import callback

    for registered in callback.callback_handler.start_callbacks:
        if isinstance(registered, Lookout):
            return
    lookout = Lookout()
    callback.on_compile_start(lookout)
    weakref.finalize(lookout, keep_watch).atexit = False
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(handler, LimitHandler) for handler in logger.handlers):
        logger.addHandler(LimitHandler(logging.WARNING))


def _after_a_frame(args: Any) -> None:
    del args
    region, code = current_region(), traced_code()
    if region is not None and code is not None:
        region.end_frame(code)


class LimitHandler(logging.Handler):
    """Hears that torch gives up a function which it has compiled too many times."""

    def emit(self, record: logging.LogRecord) -> None:
        """Tell the region at work; it may raise, which reaches the caller through torch."""
        if not str(record.msg).startswith(LIMIT) or not isinstance(record.args, tuple):
            return
        region = current_region()
        if region is not None:
            name, number, function, reason = (*record.args, "")[:4]
            text = f"torch's {name} of {number} graphs is reached (last: {reason})"
            region.reach_limit(Uncompiled("limit", str(function).replace("'", ""), text))


# ------------------------------------------------------------------- the region that is at work


def current_region() -> Region | None:
    """The record of the `torch.compile` region at work, made at need; None if it is not HEAL's."""
    for frame in _frames():
        if _is_region(frame):
            context = frame.f_locals.get("self")
            region = region_of_context(context)
            if region is None:
                region = attach(context)
                if region is not None:  # the call that is on its way has entered already
                    frame.f_locals["cleanups"].append(region.leave)
            return region
    return None


def note(report: Any) -> None:
    """Add what the passes say of the graph that is being compiled to its region's record."""
    region = current_region()
    if region is not None:
        region.add(report, report.rounds_at_breaks)


def counted(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled graph that counts its runs, as `uncompiled.graphs_run` reads them."""
    counters = torch._dynamo.utils.counters

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        counters["healpass"]["graphs run"] += 1
        return compiled(*args)

    return run


def attach(context: Any) -> Region | None:
    """Hang a record on a region of torch.compile; None if it is not HEAL's.

    Entering comes first and leaving last among the region's hooks, so that one that raises skips
    no other.
    """
    config = config_of(getattr(context, "callback", None))
    if config is None or not config.rewrites:
        return None
    keep_watch()
    isolated = getattr(context, "_isolate_recompiles_id", -1) != -1
    region = Region(config, isolated=isolated)
    context.enter_exit_hooks.insert(0, region.enter)
    context.enter_exit_hooks.append(lambda: region.leave)
    return region


def config_of(callback: Any) -> HealConfig | None:
    """The options of a region, from the callback that torch has made of its backend."""
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    settings = getattr(callback, "config", None)  # of Inductor, by `inductor_options`
    rewriting = settings.get("pre_grad_custom_pass") if isinstance(settings, dict) else None
    if isinstance(getattr(rewriting, "config", None), HealConfig):
        return rewriting.config  # type: ignore[union-attr]
    given = dict(getattr(callback, "kwargs", {}))
    backend = getattr(callback, "compiler_fn", callback)
    while isinstance(backend, functools.partial):
        given, backend = {**backend.keywords, **given}, backend.func
    name = (getattr(backend, "__module__", ""), getattr(backend, "__name__", ""))
    if name != ("healpass.backend", "heal_backend"):
        return getattr(backend, "heal_config", None)
    try:
        return HealConfig.read(given.get("options"), mode=given.get("mode"))
    except ConfigError:
        return None  # the backend raises it, where torch names the backend in the message


def region_of_context(context: Any) -> Region | None:
    """The record that hangs on a region of torch.compile, if it has one."""
    hooks = (getattr(hook, "__self__", None) for hook in getattr(context, "enter_exit_hooks", ()))
    return next((owner for owner in hooks if isinstance(owner, Region)), None)


def context_of(compiled: Any) -> Any:
    """The region behind what `torch.compile` returned: a module or a function; None if neither."""
    if hasattr(compiled, "dynamo_ctx"):
        return compiled.dynamo_ctx
    code = getattr(compiled, "__code__", None)
    cells = dict(zip(code.co_freevars, compiled.__closure__ or (), strict=True)) if code else {}
    return cells["self"].cell_contents if "self" in cells else None


def is_outermost() -> bool:
    """Whether what the frame being traced returns is what the caller of the region gets.

    It is not where an outer function runs as written, or goes on after a graph break: then other
    code takes the result, and expects the dtypes that it was written for.
    """
    caller = None
    for frame in _frames():
        if _ends_at_a_break(frame):
            return False
        if caller is None and frame.f_code is _catcher_code():
            caller, code = frame, frame.f_locals["frame"].f_code
            continue
        if caller is None:
            continue
        if _is_region(frame):
            return True
        if _continues(code):
            code = frame.f_code  # the function whose continuation this is returns its result
        elif not _passes_through(frame):
            return False
    return True


def traced_code() -> CodeType | None:
    """The code of the frame that Dynamo is tracing."""
    for frame in _frames():
        if frame.f_code is _catcher_code():
            code: CodeType = frame.f_locals["frame"].f_code
            return code
    return None


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _catcher_code() -> CodeType:
    from torch._dynamo.convert_frame import CatchErrorsWrapper

    return CatchErrorsWrapper.__call__.__code__


def _is_region(frame: FrameType) -> bool:
    """Whether a frame is the wrapper that `torch.compile` puts around a function."""
    module = frame.f_globals.get("__name__")
    return frame.f_code.co_name == "compile_wrapper" and module == "torch._dynamo.eval_frame"


def _ends_at_a_break(frame: FrameType) -> bool:
    """Whether a frame of Dynamo compiles a graph that ends where tracing had to."""
    if frame.f_code.co_name != "compile_and_call_fx_graph":
        return False
    reason = getattr(frame.f_locals.get("self"), "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def _continues(code: CodeType) -> bool:
    return code.co_name.startswith("torch_dynamo_resume_in_")


def _passes_through(frame: FrameType) -> bool:
    """Frames of torch, and of healpass, that call a module and return what it returns."""
    name = str(frame.f_globals.get("__name__"))
    return name.startswith("healpass.") or name in (
        "torch.nn.modules.module",
        "torch._dynamo.external_utils",
        "torch._dynamo.convert_frame",
        "torch._dynamo.eval_frame",
    )


def compile_limits() -> dict[str, Any]:
    """Arguments of `torch.compile` that give a region a limit of its own, where torch has them."""
    known = inspect.signature(torch.compile).parameters
    return {"recompile_limit": RECOMPILE_LIMIT} if "recompile_limit" in known else {}
