"""What mkdocs is told beyond mkdocs.yml. Imports mkdocs only.

The same Markdown is read in the repository and on the site. In the repository links go to any
file; on the site those that leave `docs/` go to the repository. Pages that live elsewhere (the
guide for contributors, the changes, the guide to the tests) are read from there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/healpass/healpass"
#: Page of the site -> the file of the repository that it shows.
ELSEWHERE = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "tests.md": "tests/README.md",
}
#: A Markdown link's target, without its brackets; addresses and anchors alone are left out.
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
#: What a page would load from somewhere else.
FOREIGN = re.compile(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that live outside of `docs/`."""
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave the site at the repository, and those to `ELSEWHERE` at its pages."""
    path = page.file.src_uri
    source = ELSEWHERE.get(path, f"docs/{path}")

    def target(link: re.Match[str]) -> str:
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        shown = {there: f"docs/{here}" for here, there in ELSEWHERE.items()}.get(found, found)
        if shown.startswith("docs/"):
            return posixpath.relpath(shown, posixpath.dirname(f"docs/{path}")) + (link[2] or "")
        kind = "tree" if (ROOT / found).is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/main/{found}{link[2] or ''}"

    return LINK.sub(target, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would ask another host for a script, a style or a picture."""
    found = [tag for tag in FOREIGN.findall(output) if 'rel="canonical"' not in tag]
    if found:
        raise PluginError(f"{page.file.src_uri} loads from the network: {found[0]}")
    return output
