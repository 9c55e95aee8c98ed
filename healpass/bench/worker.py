"""One process per contender: nothing that one compiles, caches or allocates slows another.

Layer: bench. Imports `bench.*` and `errors`. The parent asks over a pipe;
what goes wrong in a contender comes back as text and costs only that contender its row.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from healpass.bench.budget import rounding
from healpass.bench.contenders import Contender
from healpass.bench.source import ModelSource, Source
from healpass.bench.subject import Subject, held_bytes
from healpass.bench.workloads import Prepared, Workload
from healpass.errors import BenchError


@dataclass(frozen=True)
class Order:
    """What a worker is told when it starts."""

    contender: Contender
    source: Source
    device: str
    threads: int
    cold: bool = False
    """Whether compiled code of earlier processes is ignored."""


@dataclass(frozen=True)
class Memory:
    """Bytes while a workload runs.

    Attributes:
        held: Weights, packed copies and caches.
        above: Highest mark of a run above what the process held before it; None where the system
            does not tell.
    """

    held: int
    above: int | None

    @property
    def peak(self) -> int | None:
        """What is held, and what a run needs beside it."""
        return None if self.above is None else self.held + self.above


class Worker:
    """The parent's end: starts the process, asks, and reads answers.

    Raises:
        BenchError: From `ask`, when the contender failed; the message has its last line.
    """

    def __init__(self, order: Order) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, order), daemon=True)
        self._process.start()
        theirs.close()
        self.name = order.contender.name

    def ask(self, task: str, *arguments: Any) -> Any:
        """Do one of `Desk`'s tasks there and wait for its result."""
        try:
            self._pipe.send((task, arguments))
            failed, answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise BenchError(
                f"{self.name} stopped in {task!r}: its process ended with status "
                f"{self._process.exitcode}. Too little memory is the usual reason; compare fewer "
                "contenders at a time."
            ) from error
        if failed:
            raise BenchError(f"{self.name} failed in {task!r}: {answer}")
        return answer

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(ConnectionError):
            self._pipe.send(("stop", ()))
        self._process.join(timeout=5)
        self._process.kill()
        self._pipe.close()


class Desk:
    """The worker's end: one method per task."""

    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        self.subject = Subject(order.contender, order.source, order.device)
        self._prepared: dict[Workload, Prepared] = {}

    def outputs(self, workload: Workload) -> Any:
        """What the gate compares, in FP64, and the unit roundoff of what it was handed out in."""
        with _inference(workload):
            self._prepared[workload] = workload.prepare(self.subject)
            found = self._prepared[workload].outputs().detach()
        return found.double().cpu().numpy(), torch.finfo(found.dtype).eps / 2

    def rounding(self, workload: Workload, contender: Contender) -> float:
        """What a contender's number formats may lose, asked of the reference (`bench.budget`)."""
        with _inference(workload):
            return rounding(contender, workload, self.subject)

    def time(self, workload: Workload) -> float:
        """Seconds per call of the model, over one run."""
        prepared = self._prepared[workload]
        with _inference(workload):
            prepared.reset()
            return _seconds(prepared.run, self.subject.device) / prepared.calls

    def memory(self, workload: Workload) -> Memory:
        """High-water mark of one run."""
        prepared = self._prepared[workload]
        with _inference(workload):
            prepared.reset()
            held = held_bytes()
            above = _peak(prepared.run, self.subject.device)
        return Memory(held, above)

    def first_call(self, workload: Workload) -> float:
        """Seconds of the first call of a function that nobody compiled before, less the second."""
        with _inference(workload):
            prepared = workload.prepare(self.subject)
            first, second = (_seconds(prepared.run, self.subject.device) for _ in range(2))
        return first - second


def _serve(pipe: Connection, order: Order) -> None:
    """Answer until told to stop."""
    if isinstance(order.source, ModelSource):
        from transformers.utils import logging

        logging.disable_progress_bar()  # that of loading weights
    with _compile_caches(order.cold):
        desk: Desk | None = None
        while (message := pipe.recv())[0] != "stop":
            task, arguments = message
            try:
                desk = desk or Desk(order)
                pipe.send((False, getattr(desk, task)(*arguments)))
            except (RuntimeError, ValueError, TypeError, MemoryError, OSError) as error:
                cause = getattr(error, "inner_exception", error)  # what a backend raised
                lines = str(cause).strip().splitlines() or ["no message"]
                pipe.send((True, f"{type(cause).__name__}: {lines[0]}"))


def _compile_caches(cold: bool) -> Any:
    if not cold:
        return contextlib.nullcontext()
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


@contextlib.contextmanager
def _inference(workload: Workload) -> Iterator[None]:
    with torch.set_grad_enabled(workload.kind == "train"):
        yield


def _seconds(run: Callable[[], Any], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(run: Callable[[], Any], device: str) -> int | None:
    """Bytes of the highest mark of a run above the level before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present level
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except OSError:  # not Linux, or a sandbox that hides it
        return None


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
