"""The documentation says what is there: links, options, errors, commands, targets, pictures."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from healpass import Debug, HealConfig, cli, errors
from healpass.graph.pipeline import LATE_PASSES, PASSES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
        ROOT / "tests/README.md",
        *DOCS.glob("**/*.md"),
    ]
)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
#: `make target`, in a line of text and in a listing.
MAKE = re.compile(r"`make ([a-z]+(?:-[a-z]+)*)")
LISTED = re.compile(r"^ *make ([a-z]+(?:-[a-z]+)*)", re.MULTILINE)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def links(path: Path) -> Iterator[tuple[str, str]]:
    """Target and anchor of each relative link outside of listings."""
    yield from LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8")))


def anchor(heading: str) -> str:
    """What a heading is called in an address, by GitHub and by the site alike."""
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower())
    return re.sub(r"\s+", "-", plain.strip())


def anchors(path: Path) -> set[str]:
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {anchor(heading) for heading in found}


def dead(path: Path) -> list[str]:
    """The links of a page that lead to no file, or to no heading of one."""
    found = []
    for target, where in links(path):
        there = (path.parent / target).resolve() if target else path
        lost = there.suffix == ".md" and where and where not in anchors(there)
        if not there.exists() or lost:
            found.append(f"{target}#{where}")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    assert not dead(path)


def test_a_dead_link_is_noticed(tmp_path):
    (tmp_path / "there.md").write_text("# One heading\n")
    broken = tmp_path / "page.md"
    broken.write_text("[a](there.md) [b](there.md#one-heading) [c](there.md#two) [d](gone.md)\n")
    assert dead(broken) == ["there.md#two", "gone.md#"]


def test_the_readme_fits_three_screens():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


@pytest.mark.parametrize("record", [HealConfig, Debug])
def test_every_option_is_explained(record):
    explained = set(re.findall(r"^\| `(\w+)` \|", page("options.md"), re.MULTILINE))
    assert {field.name for field in dataclasses.fields(record)} <= explained


def test_every_error_is_explained():
    classes = {
        name
        for name, found in inspect.getmembers(errors, inspect.isclass)
        if issubclass(found, errors.HealError)
    }
    headings = set(re.findall(r"^## (\w+)$", page("reference/errors.md"), re.MULTILINE))
    assert headings == classes


def test_every_command_and_option_of_the_command_line_is_explained():
    text = page("reference/command-line.md")
    commands = typer.main.get_command(cli.app).commands
    assert re.findall(r"^## healpass (\w+)$", text, re.MULTILINE) == list(commands)
    for name, command in commands.items():
        section = text.split(f"## healpass {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            for option in filter(lambda word: word.startswith("--"), parameter.opts):
                assert option in section, f"{option} of healpass {name}"


def test_every_pass_is_explained_in_order():
    rows = re.findall(r"^\| `(\w+)` \|", page("how/passes.md"), re.MULTILINE)
    assert rows == [*PASSES, *LATE_PASSES]


def test_every_target_of_make_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in PAGES:
        text = path.read_text("utf-8")
        listed = [target for listing in FENCE.findall(text) for target in LISTED.findall(listing)]
        named = {*MAKE.findall(text), *listed}
        assert named <= targets, f"{path.name} names {named - targets}"


def test_pictures_are_those_that_the_script_draws():
    drawn = runpy.run_path(str(DOCS / "pictures" / "draw.py"))["PICTURES"]
    assert {f"{draw.__name__}.svg" for draw in drawn} == {
        path.name for path in DOCS.glob("pictures/*.svg")
    }
    for draw in drawn:
        assert draw().svg() == page(f"pictures/{draw.__name__}.svg")
