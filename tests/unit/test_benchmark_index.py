"""The index of the benchmarks is current and complete."""

from __future__ import annotations

from benchmarks.lib.machine import RESULTS, ROOT
from benchmarks.render_index import find_results, read_docstring, render_index


def test_index_is_current():
    current = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert current == render_index(), "run python -m benchmarks.render_index"


def test_each_result_belongs_to_a_question():
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if read_docstring(path)[0].endswith("?")]
    found = {result for script in scripts for result in find_results(script.stem)}
    assert found == set(RESULTS.glob("*.json"))
