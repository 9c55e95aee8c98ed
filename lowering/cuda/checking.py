"""How the parts of `selfcheck` run their checks: those of one template together.

A part is a module: `selfcheck_matmul`, `selfcheck_attention`, `selfcheck_exact`,
`selfcheck_paged`. Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar


class Part(Protocol):
    """Checks of some templates; no template is in two parts.

    A check is a small problem; its `templates` are all that it goes through, and to blame.
    """

    def checks(self) -> Iterator[Any]:
        """Every template of the part, with every form of operand that it has."""
        ...

    def faults(self, check: Any, found: Any, /) -> dict[str, str]:
        """What is wrong with what a check gave, by template."""
        ...

    def together(self, device: str) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """What runs several checks on a device, in one compile where they are compiled."""
        ...


AnyCheck = TypeVar("AnyCheck")
Result = TypeVar("Result")


def each(
    checks: Iterable[AnyCheck],
    run: Callable[[AnyCheck], Result],
    faults: Callable[[AnyCheck, Result], dict[str, str]],
) -> dict[str, str]:
    """Run checks one by one; what is wrong, by template.

    Args:
        checks: Which.
        run: Gives the result of one.
        faults: Of a result.
    """
    wrong: dict[str, str] = {}
    for check in checks:
        wrong |= faults(check, run(check))
    return wrong


def examined(part: Part, device: str, template: str) -> dict[str, str | None]:
    """What is wrong with a template of a part, None if nothing is.

    Its checks run together. Templates that have no other check are answered, too.

    Args:
        part: Whose checks are run.
        device: As torch names it.
        template: Its name.
    """
    everything = list(part.checks())
    chosen = [check for check in everything if template in check.templates]
    found = dict(zip(chosen, part.together(device)(chosen), strict=True))
    wrong = each(chosen, found.__getitem__, part.faults)
    open_ = {name for check in everything if check not in chosen for name in check.templates}
    answered = {name for check in chosen for name in check.templates} - open_
    return {name: wrong.get(name) for name in sorted(answered)}
