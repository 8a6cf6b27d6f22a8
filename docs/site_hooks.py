"""What MkDocs does to the pages beyond Markdown: settings from the code, and links into the source tree.

The pages are written for a code host, where ``../benchmarks/x.py`` leads somewhere; the site takes such files along.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from collm_dist.config.reference import render_experiments, render_settings

ROOT = Path(__file__).parents[1]
SETTINGS_MARK = "<!-- settings -->"
# Pages of the tree that have one of their own on the site.
TWINS = {"README.md": "index.md", "configs/README.md": "configuration.md"}
# What browsers show as it is; everything else they are told to be text.
SHOWN_SUFFIXES = {".json", ".png", ".svg", ".txt"}

_LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the source tree that pages link to."""
    for page in list(files.documentation_pages()):
        for place in _list_outside(page.content_string, page.src_uri):
            if place not in TWINS and files.get_file_from_path(_name_copy(place)) is None:
                files.append(File.generated(config, _name_copy(place), abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put in the settings, and turn links into the source tree to where the site has the files."""

    def turn(match: re.Match[str]) -> str:
        place = _resolve(match[2], page.file.src_uri)
        if place not in TWINS and not (ROOT / place).is_file():
            return match[0]  # MkDocs complains
        target = posixpath.relpath(TWINS.get(place, _name_copy(place)), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    text = _LINK.sub(turn, markdown)
    return text.replace(SETTINGS_MARK, f"{render_experiments(ROOT / 'configs')}\n{render_settings()}")


def _list_outside(markdown: str, page: str) -> Iterator[str]:
    for match in _LINK.finditer(markdown):
        place = _resolve(match[2], page)
        if (ROOT / place).is_file():
            yield place


def _resolve(link: str, page: str) -> str:
    """Return the path from the root of the source tree of what a page below docs/ links to."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))


def _name_copy(place: str) -> str:
    return f"files/{place}" + ("" if Path(place).suffix in SHOWN_SUFFIXES else ".txt")
