"""What healpass raises. Lowest layer: imports nothing of healpass.

Every message answers four questions: what was asked, what was found, why that does not work, and
the way out. torch wraps a backend's exception and prints its first line, so the first line stands
alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HealError(Exception):
    """Root of everything healpass raises on purpose."""


class ConfigError(HealError, ValueError):
    """An option has an unknown name, a wrong type or an impossible value."""


class UnavailableError(HealError):
    """An option is known, but this version of healpass cannot do it yet."""


class MissingExtraError(HealError, ImportError):
    """A module needs a package that a plain installation of healpass leaves out."""


class UnsupportedTorchError(HealError):
    """The installed torch lies outside the supported range."""


class StrictError(HealError):
    """`strict=True` was asked for, and the graph holds a node that cannot be rewritten."""


class OperandError(HealError, ValueError):
    """An operator got sizes or arguments for which it has no result."""


class DtypeError(HealError, TypeError):
    """An operator got a dtype that it does not take."""


class DerivativeError(HealError, RuntimeError):
    """A derivative was asked for that an operator does not have."""


class NoRuleError(HealError, ValueError):
    """How a function passes errors on is not known, or not for these arguments."""


class DeviceCheckError(HealError):
    """An exact kernel gave other bits than its reference in the check on this GPU."""


class GraphCheckError(HealError):
    """A pass left the graph in a state that breaks a promise. Always a bug of healpass."""


class CacheError(HealError, ValueError):
    """A key/value cache is used in a way that would lose or overwrite data."""


class TaskError(HealError, ValueError):
    """A file of tasks cannot be read, or a line in it is not a task."""


class FetchError(HealError):
    """A model file could not be fetched, or is not the file it should be."""


class StudyError(HealError, ValueError):
    """The data of a reproducibility study do not fit together or cannot be used."""


class BenchError(HealError):
    """A contender of `healpass bench` could not run."""


def missing_extra(module: str, extra: str, error: ImportError) -> MissingExtraError:
    """What to raise where an optional package cannot be imported.

    Args:
        module: The module of healpass that needs the package.
        extra: The extra of healpass that installs it.
        error: What the import raised.

    Returns:
        An error that names the pip command where the package is absent. Where it is there and
        fails to import, pip would change nothing: then the error says what really failed.
    """
    pip = f"pip install 'healpass[{extra}]'"
    if isinstance(error, ModuleNotFoundError) and error.__cause__ is None:
        return MissingExtraError(
            f"{module} cannot be imported: {error}. Install what it needs with: {pip}"
        )
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is error:
        return MissingExtraError(
            f"{module} cannot be imported: {error}. That package is installed, in a version that "
            f"healpass does not know, or broken. Versions that fit: {pip}"
        )
    absent = cause.name if isinstance(cause, ModuleNotFoundError) else None
    way = f"Install {absent}." if absent else (
        "Repair or remove the package that raises this (often a torchvision or torchaudio made "
        "for another torch)."
    )  # fmt: skip
    return MissingExtraError(
        f"{module} cannot be imported, because an installed package fails to import: "
        f"{type(cause).__name__}: {cause}\n"
        f"What is reported on top of it: {error}\n"
        f"{way} Installing healpass again does not help."
    )


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
