"""What torch leaves uncompiled where HEAL was asked to compile: the record, and what follows.

Dynamo gives frames back to the interpreter in silence: past its limit of graphs per function, at
what it cannot trace, at `torch.compiler.disable`, with `suppress_errors`. There the model runs as
written, in 16 bits, and every promise about its arithmetic ends. `exact` and `strict` refuse that;
the others warn once. `watch` finds out about it. Imports `config` and `errors`.
"""

from __future__ import annotations

import re
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from healpass.config import HealConfig
from healpass.errors import StrictError

PACKAGE = str(Path(__file__).parent)
#: Dynamo's own name of a reason.
DISABLED = "Skip calling `torch.compiler.disable()`d function"

_WAY_OUT = {
    "limit": "call it in fewer ways (one batch form, one mask form), compile with "
    "torch.compile(..., dynamic=True, recompile_limit=64) where torch has that argument, or raise "
    "torch._dynamo.config.recompile_limit before",
    "skipped": "move what torch cannot trace out of the compiled function (random seeds, prints "
    "in loops, I/O), or compile the modules inside: module.compile(backend='heal')",
    "unused": "leave the stance or mode, or call torch._dynamo.reset() before this model",
    "disabled": "take torch.compiler.disable off that function, or move its call out of the "
    "compiled model",
}


@dataclass(frozen=True)
class Uncompiled:
    """Something that ran as written instead of as HEAL compiles it.

    Attributes:
        kind: `limit` (torch's limit of graphs), `skipped` (a whole frame), `disabled` (a function
            under `torch.compiler.disable`), `unused` (a whole call),
            `break` (a graph break: what caused it ran as written, and values crossed it in the
            dtypes of the model).
        where: The function, `name (file:line)`.
        reason: What torch says, in one line.
    """

    kind: str
    where: str
    reason: str

    @property
    def ends_a_promise(self) -> bool:
        """Whether whole functions ran outside HEAL, not only what caused a graph break."""
        return self.kind != "break"

    def __str__(self) -> str:
        """One line: where and why."""
        return f"{self.where}: {self.reason}"


#: A whole call of a region in which torch neither ran a compiled graph nor tried to make one.
NOTHING_RAN = Uncompiled(
    "unused",
    "a whole call",
    "no compiled graph ran. torch was told to run it as written (a stance, a dispatch mode such "
    "as FlopCounterMode, TORCHDYNAMO_DISABLE), or gave the function up for another compiled "
    "model of the same class",
)


class Region:
    """The record of one `torch.compile` call with HEAL: its graphs and what was left out.

    Attributes:
        config: The options.
        reports: What the passes did, graph by graph.
        found: What was left uncompiled since the last `torch._dynamo.reset()`.
        isolated: Whether the region was compiled with `isolate_recompiles`.
        silent: Whether the record is only kept, for whoever asks (`explain`).
    """

    def __init__(self, config: HealConfig, *, isolated: bool = False) -> None:
        self.config = config
        self.reports: list[Any] = []
        self.found: dict[Uncompiled, None] = {}
        self.isolated = isolated
        self.silent = False
        self._rounds = False
        self._told: set[Uncompiled] = set()
        self._refused: str | None = None
        self._given_up: list[tuple[CodeType, Uncompiled]] = []
        self._handled = sys.exc_info()[1]  # what the caller is handling is none of ours
        self._breaks: Counter[str] = Counter()
        self._traced = 0
        self._before = (0, 0)
        self._tracing: BaseException | None = None
        self._ran = False
        self._codes: set[CodeType] = set()
        self._alive: Callable[[], Any] | None = None

    # ------------------------------------------------------------- around a call of the region

    def enter(self) -> Callable[[], None]:
        """Runs before a call; refuses it where an earlier one showed what it would leave out."""
        if self._alive is not None and self._alive() is None:
            self._forget()  # `torch._dynamo.reset()`: everything is traced anew
        if self._refused is not None:
            raise StrictError(self._refused)
        self._handled = sys.exc_info()[1]
        self._given_up = []
        self._before = (graphs_run(), self._traced)
        return _nothing

    def _forget(self) -> None:
        self.reports, self.found, self._refused = [], {}, None
        self._ran, self._traced = False, 0
        self._told, self._rounds, self._alive = set(), False, None

    def leave(self) -> None:
        """Runs after a call: warns, refuses, or makes good what a user's mistake left behind."""
        if sys.exc_info()[1] is not self._handled:
            for code, record in self._given_up:  # the error is the caller's to see
                _trace_again(code, self.isolated)
                self.found.pop(record, None)
            return
        if self._before != (graphs_run(), self._traced):
            self._ran = self._ran or self._before[0] != graphs_run()
        elif (self._ran or not self._traced) and (self.refuses or not self._ended()):
            self.found[NOTHING_RAN] = None
            for code in self._codes:  # a mode marks code for good, and may be over by now
                _trace_again(code, self.isolated)
        new = [record for record in self.found if record not in self._told]
        self._told.update(new)
        ended = [record for record in new if record.ends_a_promise]
        if self.silent or not new:
            return
        if ended == [NOTHING_RAN] and self.refuses:
            self._told.discard(NOTHING_RAN)  # a mode is over at some time: the next call is judged
            del self.found[NOTHING_RAN]
            raise StrictError(self._message(ended))
        if ended and self.refuses:
            self._refused = self._message(ended)
            raise StrictError(self._refused)
        if ended:
            warnings.warn(self._message(ended), stacklevel=3)
        elif self._rounds:
            warnings.warn(_rounding(new), stacklevel=3)

    def _ended(self) -> bool:
        """Whether it was told already that functions run as written."""
        return any(record.ends_a_promise for record in self.found)

    @property
    def refuses(self) -> bool:
        """Whether running a part uncompiled is an error."""
        return self.config.precision == "exact" or self.config.strict

    def add(self, report: Any, rounds: bool) -> None:
        """Keep what the passes say of a graph, and whether it hands rounded values to others."""
        self.reports.append(report)
        self._rounds = self._rounds or rounds

    def _message(self, records: list[Uncompiled]) -> str:
        ways = {_WAY_OUT[record.kind]: None for record in records}
        asked = f"precision={self.config.precision!r}" + (
            ", strict=True" if self.config.strict else ""
        )
        return (
            f"{asked} was asked for, but torch left {len(records)} function(s) uncompiled, which "
            f"run as written, in the model's own dtype: {_listed(records)}\n"
            f"Way out: {'; or '.join(ways)}. healpass.status(model) lists what was left out."
        )

    # -------------------------------------------------------------- around the trace of a frame

    def begin_frame(self, lookout: Any) -> None:
        """Runs before a frame is traced; what is found holds while torch keeps `lookout`."""
        self._alive = weakref.ref(lookout)
        self._traced += 1
        self._breaks = Counter(torch._dynamo.utils.counters["graph_break"])
        self._tracing = sys.exc_info()[1]

    def end_frame(self, code: CodeType) -> None:
        """Runs after it: an exception in flight says that the frame is given up, and why."""
        self._codes.add(code)
        error = sys.exc_info()[1]
        if error is not None and error is not self._tracing:
            record = Uncompiled("skipped", describe(code), one_line(str(error)))
            self._given_up.append((code, record))
            self.found[record] = None
            return
        breaks = Counter(torch._dynamo.utils.counters["graph_break"]) - self._breaks
        if code.co_filename.startswith(PACKAGE):
            return  # a wrapper of ours around the function, where the break is noted, too
        for reason in map(one_line, breaks):
            kind = "disabled" if reason.startswith(DISABLED) else "break"
            self.found[Uncompiled(kind, describe(code), reason)] = None

    def reach_limit(self, record: Uncompiled) -> None:
        """Runs where torch gives a function up for good, having compiled it so many times."""
        self.found[record] = None
        if self.refuses and not self.silent:
            # Raised here the function stays open to the kinds of call that are compiled already.
            self._told.add(record)
            raise StrictError(self._message([record]))


def graphs_run() -> int:
    """How many compiled graphs of HEAL's have run, counted where torch counts what Dynamo does.

    A region may run a graph that an equal one has compiled, so none can count its own.
    """
    return torch._dynamo.utils.counters["healpass"]["graphs run"]


def _nothing() -> None:
    """What a hook returns that has nothing to do afterwards."""


def _listed(records: list[Uncompiled]) -> str:
    """The first in the line that names the problem, the others below it."""
    return "\n  also ".join(map(str, records))


def _rounding(records: list[Uncompiled]) -> str:
    return (
        f"torch splits the compiled function at {len(records)} graph break(s), and what crosses "
        f"one is rounded to the model's own dtype: {_listed(records)}\n"
        "Way out: take out what breaks the graph; torch.compile(..., fullgraph=True) shows where. "
        "healpass.status(model) lists the breaks."
    )


def describe(code: CodeType) -> str:
    """`forward (/path/model.py:12)`; a continuation after a graph break is its function."""
    name = re.sub(r"^torch_dynamo_resume_in_(.*)_at_\d+$", r"\1", code.co_name)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})"


def one_line(text: str) -> str:
    """Dynamo's reason and explanation without its hints and traces."""
    lines = [line.strip() for line in text.strip().splitlines()]
    first = 2 if lines and lines[0].endswith(":") else 1
    explained = [line for line in lines[first:] if line.startswith("Explanation:")][:1]
    return " ".join(lines[:first] + explained)


def _trace_again(code: CodeType, isolated: bool) -> None:
    """Let Dynamo try a function again that it gave up because of a caller's mistake.

    It marks the code itself, which all models of a class share, and never looks again. The mark of
    an isolated region goes only with all that was compiled of the function.
    """
    from torch._C._dynamo.eval_frame import reset_code, set_code_exec_strategy
    from torch._dynamo.types import FrameAction, FrameExecStrategy

    if isolated:
        reset_code(code)
        return
    set_code_exec_strategy(code, FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT))
