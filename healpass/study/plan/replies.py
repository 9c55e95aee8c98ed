r"""What a model's reply, free text, answers.

Layer: study. Imports nothing of healpass.

What counts as the answer, in this order:

1. Thinking (`<think> ... </think>`) is cut off; a reply cut short while thinking has no answer.
2. The last `\boxed{...}` or `Answer: ...` line that is not empty; without one, the last
   `the answer is ...`. Of several numbers there, the first after the last `=`.
3. Without either: the last number of the reply, or the one option that it names.

A refusal without 2., a range or list ("5 to 10", "A or B") and several different options have no
answer: a reply that leaves the choice to the reader is not right by chance.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise

_REFUSAL = re.compile(
    r"\bI['\u2019]?m sorry\b|\bI can(?:not|['\u2019]t)\b|\bunable to\b"
    r"|\bcannot (?:help|assist|provide|answer|determine|be determined)\b",
    re.IGNORECASE,
)
#: Line ends, emphasis and mathematics mode between a sign of an answer and the answer.
_OPENING = r"(?:[\s*_$]|\\[\[(])*"
#: From the strongest sign of an answer to the weakest.
_MARKERS = (
    re.compile(
        rf"\\boxed\s*\{{|\banswer[*_]*(?:\s\([^()\n]{{0,40}}\))?\s*:{_OPENING}", re.IGNORECASE
    ),
    re.compile(rf"\banswer[*_]*\s+is\b:?{_OPENING}", re.IGNORECASE),
)
#: What stands between two answers when a reply gives both.
_HEDGE = re.compile(
    r"\W{0,4}(?:[-/,\u2013\u2014]|to|or|and)\W{0,4}(?:option\W{0,4})?", re.IGNORECASE
)
_THIN = "\N{NARROW NO-BREAK SPACE}\N{NO-BREAK SPACE}\N{THIN SPACE}"
_TIMES = "\N{MULTIPLICATION SIGN}"
_PLAIN = (
    (re.compile(r"\\[td]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;:! ]"), _THIN[0]),
    (re.compile(r"\\(?:times|cdot)\b"), _TIMES),
    (re.compile(r"\\approx\b"), "\N{ALMOST EQUAL TO}"),
    (re.compile(r"\^\{([^{}]*)\}"), r"^\1"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile("\N{MINUS SIGN}"), "-"),
)
_NUMBER = re.compile(
    rf"""
    (?:(?<![0-9A-Za-z_.)])(?P<minus>-)|(?<![0-9A-Za-z_.])|(?<=USD)|(?<=EUR)|(?<=GBP))
    [$€£]?(?P<late_minus>(?<=[$€£])-)?
    (?P<digits>[0-9]+(?:[.,'\u2019{_THIN}][0-9]+)*|\.[0-9]+)
    (?:\s?/\s?(?P<under>[0-9]+(?:\.[0-9]+)?)(?![0-9/.]))?
    (?:e(?P<e>[-+]?[0-9]{{1,2}})(?![0-9])
      |\s?[{_TIMES}x*]\s?10\^(?P<power>-?[0-9]{{1,2}})(?![0-9]))?
    (?:\s*(?P<percent>%|per\s?cent\b)|\s*(?P<scale>thousand|million|billion)\b)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9}


def read_number(reply: str, *, percent_is_unit: bool = False) -> Decimal | None:
    """Return the number that a reply answers.

    `1,234.5`, `1.234,5` and `1'234.5` are one number; a single comma before three digits groups
    thousands. Fractions of two numbers, powers of ten and the words thousand, million and billion
    are worked out.

    Args:
        reply: The model's text.
        percent_is_unit: Whether `5%` is the number 5; else it is 0.05.
    """
    text, is_marked = _answering_part(reply)
    if is_marked:
        text = re.split("[=\N{ALMOST EQUAL TO}]", text)[-1]
    found = list(_NUMBER.finditer(text))
    pair = found[:2] if is_marked else found[-2:]
    if not found or _hedges(text, pair):
        return None
    return _value(pair[0] if is_marked else pair[-1], percent_is_unit)


def read_letter(reply: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that a reply chooses; `A` is the first of `options`."""
    text, is_marked = _answering_part(reply)
    letters = string.ascii_uppercase[: len(options)]
    alone = text.strip(string.punctuation + string.whitespace).upper()
    if len(alone) == 1 and alone in letters:
        return alone
    # An "A" before a lower-case word is an article, save "is", "or" and "and".
    found = re.finditer(
        rf"(?<![\w'])(?:(?!A\s+(?!(?:is|or|and)\b)[a-z])[{letters}])(?![\w'])", text
    )
    letter = _one_of(text, list(found), is_marked)
    if letter is not None:
        return letter
    named = read_label(reply, options)
    return None if named is None else letters[list(options).index(named)]


def read_label(reply: str, labels: Sequence[str]) -> str | None:
    """Return the label of a reply, as `labels` spells it; "not allowed" is no "allowed"."""
    text, is_marked = _answering_part(reply)
    longest_first = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.finditer(rf"(?<!not )(?<!n't )(?<!\w)(?:{longest_first})(?!\w)", text, re.I)
    label = _one_of(text, list(found), is_marked)
    return next((known for known in labels if known.casefold() == (label or "").casefold()), None)


def _answering_part(reply: str) -> tuple[str, bool]:
    """Return the part of a reply to look at, and whether the reply marks it as its answer."""
    text = reply.rpartition("</think>")[2].partition("<think>")[0]
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    for marker in _MARKERS:
        for match in reversed(list(marker.finditer(text))):
            segment = _segment(text, match)
            if segment:
                return segment, True
    return ("" if _REFUSAL.search(text) else text), False


def _segment(text: str, marker: re.Match[str]) -> str:
    """Return the rest of the marker's line or, in a LaTeX box, what stands up to its brace."""
    end = text.find("\n", marker.end())
    line = text[marker.end() : end if end >= 0 else len(text)]
    if marker.group().endswith("{"):
        depth = 1
        for position, character in enumerate(line):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                return line[:position].strip()
    return line.strip()


def _one_of(text: str, found: list[re.Match[str]], is_marked: bool) -> str | None:
    """Return the first of what was found in a marked part, else the only thing found."""
    if is_marked:
        found = [] if _hedges(text, found[:2]) else found[:1]
    names = {match.group().casefold() for match in found}
    return found[0].group() if len(names) == 1 else None


def _hedges(text: str, found: list[re.Match[str]]) -> bool:
    """Whether two neighbours are alternatives or the ends of a range."""
    return any(
        one.group() != two.group() and _HEDGE.fullmatch(text, one.end(), two.start())
        for one, two in pairwise(found)
    )


def _value(match: re.Match[str], percent_is_unit: bool) -> Decimal | None:
    value = _decimal(match["digits"])
    under = Decimal(match["under"] or 1)
    if value is None or under == 0:
        return None
    exponent = int(match["e"] or match["power"] or 0)
    exponent += _SCALES.get((match["scale"] or "").lower(), 0)
    exponent -= 2 if match["percent"] and not percent_is_unit else 0
    sign = -1 if match["minus"] or match["late_minus"] else 1
    return sign * value / under * Decimal(10) ** exponent


def _decimal(digits: str) -> Decimal | None:
    """Return the value of digits with separators; None if they are no number (`1.2.3`)."""
    digits = re.sub(rf"['\u2019{_THIN}]", "", digits)
    groups = re.split("[.,]", digits)
    separators = re.findall("[.,]", digits)
    if not separators:
        return Decimal(digits)
    *grouping, last = separators
    are_thousands = (
        len(groups[0]) <= 3 and groups[0] not in ("", "0") and all(len(g) == 3 for g in groups[1:])
    )
    if len(set(separators)) == 1 and (grouping or (last == "," and are_thousands)):
        return Decimal("".join(groups)) if are_thousands else None
    if last in grouping:
        return None
    return Decimal("".join(groups[:-1]) + "." + groups[-1])
