"""Index of the benchmarks, benchmarks/README.md, and the page docs/results.md, from docstrings and results.

python -m benchmarks.render_index
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import RESULTS, ROOT
from benchmarks.lib.reproduction_page import write_page

FOLDER = ROOT / "benchmarks"
# Names of results that do not begin with the name of their script.
RESULT_NAMES = {"cross_fit_leak": "cross_fit", "serving": "serve"}
# Versions that matter most, the first that a result has.
SHOWN_VERSIONS = ("torch", "pandas")
INTRODUCTION = """# Benchmarks

Each script answers one question and writes its result, with hardware, versions and all samples, to `results/`. Run a
script from the root of the repository; `--help` explains its arguments. `lib/` holds what several scripts share. This
page is rendered by `python -m benchmarks.render_index`.
"""
ARCHIVE = """
## Archive

Results of older engines or of deleted scripts, in `results/archive/`. They are kept as a record.
"""


def read_docstring(path: Path) -> list[str]:
    """Return the lines of a script's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()


def find_command(lines: Sequence[str]) -> str:
    """Return the first command of a docstring for a table, without its optional arguments."""
    command = next(line.strip() for line in lines if line.strip().startswith("python -m benchmarks."))
    return command.partition(" [")[0].replace("|", r"\|")


def find_results(stem: str) -> list[Path]:
    """Return the results of a script."""
    return sorted(RESULTS.glob(f"{RESULT_NAMES.get(stem, stem)}_*.json"))


def describe_result(path: Path) -> str:
    """Return a link to a result, with hardware, date and versions."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    hardware, versions = record.get("hardware", {}), record.get("versions", {})
    machine = hardware.get("gpu") or f"{hardware.get('cpus', '?')} CPUs, {hardware.get('processor', 'unknown')}"
    shown = next((f"{name} {versions[name]}" for name in SHOWN_VERSIONS if name in versions), None)
    facts = [machine, record.get("date"), shown or (f"torch {record['torch']}" if "torch" in record else None)]
    return f"[{path.stem}]({path.relative_to(FOLDER).as_posix()}) ({', '.join(fact for fact in facts if fact)})"


def render_index() -> str:
    """Return the text of benchmarks/README.md."""
    questions, tools = [], []
    for path in sorted(FOLDER.glob("*.py")):
        lines = read_docstring(path)
        if not lines[0].endswith("?"):
            tools.append(f"| {lines[0]} | `{find_command(lines)}` |")
            continue
        results = "<br>".join(map(describe_result, find_results(path.stem))) or "not measured yet"
        questions.append(f"| {lines[0]} | `{find_command(lines)}` | {results} |")
    archived = [f"- {describe_result(path)}" for path in sorted((RESULTS / "archive").rglob("*.json"))]
    parts = [
        INTRODUCTION,
        *("| question | command | results |", "|---|---|---|", *questions),
        *("", "## Tools", "", "| tool | command |", "|---|---|", *tools),
        ARCHIVE,
        *archived,
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the index and the page of results."""
    (FOLDER / "README.md").write_text(render_index(), encoding="utf-8")
    write_page(ROOT / "docs" / "results.md", RESULTS)


if __name__ == "__main__":
    main()
