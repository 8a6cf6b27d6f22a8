"""Results of a run in README.md: replace the section between its markers.

python -m benchmarks.render_readme runs/ml100k_demo
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import ROOT
from collm_dist.errors import CollmError
from collm_dist.evaluation.report_markdown import render_results
from collm_dist.runs.atomic_files import open_atomic
from collm_dist.runs.run_dir import RunDir

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def render_section(run_dir: RunDir) -> str:
    """Return the results of a run as Markdown."""
    report = run_dir.read_record("eval")
    split = "test" if any(row["split"] == "test" for row in report["rows"]) else "valid"
    rows = [row for row in report["rows"] if (row["split"], row["slice"]) == (split, "all")]
    lines = [f"`{run_dir.path.name}`, {split}, {rows[0]['rows']:,} rows:", "", render_results(rows), ""]
    lines += [f"{name}: {_describe_stage(run_dir.read_record(name))}  " for name in ("stage1", "stage2")]
    return "\n".join([*lines, "", *report["warnings"]])


def _describe_stage(summary: dict[str, Any]) -> str:
    return (
        f"{summary['global_steps']} steps, {summary['trainable_parameters']:,} trainable parameters, "
        f"{summary['throughput']['samples_per_second']:.1f} samples/s, {summary['memory']['peak_gib']:.1f} GiB"
    )


def replace_section(text: str, section: str) -> str:
    """Return the README with the part between the markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main() -> int:
    """Render, and return the exit code."""
    if len(sys.argv) != 2:
        print("usage: python -m benchmarks.render_readme RUN_DIR", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    try:
        section = render_section(RunDir(Path(sys.argv[1])))
    except CollmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    with open_atomic(readme) as file:
        file.write(replace_section(readme.read_text(encoding="utf-8"), section))
    return 0


if __name__ == "__main__":
    sys.exit(main())
