"""Table of the fault suite's last results in docs/reliability.md: ``python -m tests.faults.render``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from collm_dist.runs.atomic_files import open_atomic

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "reliability.md"
COST = FOLDER.parents[1] / "benchmarks" / "results" / "checkpoint_cost_cpu.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

STAGE = "stage 1, LoRA dropout 0.3, float32, one process: adapter, merged backbone and all losses are equal"
PROMISES = {
    "kill": ("A stage that is killed at any point resumes bit for bit", f"`kill -9` at random moments; {STAGE}"),
    "pipeline": (
        "A pipeline that is killed at any point ends with the same artifacts",
        "`kill -9` of `launch/run_pipeline.py` and its child processes; content hashes of all steps are equal",
    ),
    "damage": (
        "A damaged checkpoint is detected, and the previous one is used",
        "after a kill the newest checkpoint is truncated or one bit is flipped; same result, with a warning",
    ),
    "pause": ("A pause changes nothing", "SIGSTOP and SIGCONT at random moments; same result"),
    "disk_full": (
        "A full disk ends a stage with the remedy; with space it resumes",
        "a tmpfs of 2 MB is filled while a stage runs; exit code 3, then the same result",
    ),
    "read_only": (
        "The same for a directory that becomes read-only",
        "the tmpfs is remounted read-only while a stage runs; exit code 3, then the same result",
    ),
}


def render_faults(results: dict[str, Any]) -> list[str]:
    """Return a table row for each kind of injected fault.

    Args:
        results: of the suite.
    """
    lines = []
    for kind, (promise, how) in PROMISES.items():
        record = results["kinds"].get(kind)
        if record is None:
            result = "not run yet"
        elif "skipped" in record:
            result = f"skipped: {record['skipped']}"
        else:
            phases = ", ".join(f"{count} {phase}" for phase, count in sorted(record["phases"].items()))
            result = (
                f"{record['kill_points']} faults, {record['recovered']} recovered, {record['lost']} lost ({phases})"
            )
        lines.append(f"| {promise} | {how} | {result} |")
    return lines


def render_fuzz(results: dict[str, Any]) -> str:
    """Return the table row of the fuzzer.

    Args:
        results: of ``tests.faults.fuzz``.
    """
    result = (
        "{cases:,} cases: {read:,} read, {refused:,} refused with a message, {tracebacks:,} tracebacks, "
        "{hangs:,} hangs, {crashes:,} crashes".format(**results)
    )
    return (
        "| Damaged or hostile files and settings are read or refused with a message; no traceback, hang or crash "
        f"| `python -m tests.faults.fuzz`: {len(results['fuzzers'])} readers and loaders, mutated files for "
        f"{results['seconds']:.0f} seconds, at most ten per case | {result} |"
    )


def render_corruption(results: dict[str, Any]) -> str:
    """Return the table row of ``tests.faults.corruption``.

    Args:
        results: of the suite; without the corruption run the row says so.
    """
    found = results.get("corruption")
    result = (
        "not run yet"
        if found is None
        else (
            "{corruptions:,} cases: {refused:,} refused with a message, {healed:,} healed, {without_effect:,} without "
            "effect, {silently_different:,} silently different, {tracebacks:,} tracebacks".format(**found)
        )
    )
    uses = ", ".join(f"{sum(counts.values()):,} {use}" for use, counts in sorted((found or {}).get("uses", {}).items()))
    return (
        "| A damaged file of a finished, a published or an exported run is refused, healed, or changes no result "
        "| `python -m tests.faults.corruption`: each file cut, emptied, one bit flipped, replaced by junk, a directory "
        f"or a dangling link, removed or made unreadable; then used ({uses}) | {result} |"
    )


def render_cost(record: dict[str, Any]) -> str:
    """Return the table row of the cost of checks and checkpoints.

    Args:
        record: of ``benchmarks.checkpoint_cost``.
    """
    config, step = record["config"], record["median_step_seconds"]["on"]
    low, high = record["checks_share_of_step_95"]
    return (
        "| A checkpoint stalls training for less than a second; all checks together take less than 2 % of a step "
        f"| `benchmarks/checkpoint_cost.py`: {config['backbone']}, LoRA of rank {config['lora']['rank']}, "
        f"{config['rows_per_step']} rows per step, {config['threads']} thread of {record['hardware']['processor']}; "
        f"steps with and without all checks in turn, {len(record['seconds']['on'])} times "
        f"| stall {record['median_stall_seconds']:.3f} s (longest {record['longest_stall_seconds']:.3f} s) for "
        f"{record['checkpoint_bytes'] / 1e6:.1f} MB; checks {record['checks_share_of_step']:.2%} of a step of "
        f"{step:.2f} s [{low:.2%}, {high:.2%}], a checkpoint every {config['checkpoint_every_steps']} steps "
        f"{record['checkpoints_share_of_step']:.3%} |"
    )


def describe_making(results: dict[str, Any]) -> str:
    """Return the provenance of the suite's results."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    return (
        f"Kills: {results['kill_points']}, recovered {results['recovered']}, lost {results['lost']}. Seed "
        f"{results['seed']}; {versions}. The seed determines the moments of the kills; "
        "the phase that is hit depends on the machine's speed."
    )


def main() -> None:
    """Render."""
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    lines = ["| promise | how it is tested | last result |", "|:--|:--|:--|", *render_faults(results)]
    fuzz = FOLDER / "fuzz.json"
    if fuzz.exists():
        lines.append(render_fuzz(json.loads(fuzz.read_text(encoding="utf-8"))))
    lines.append(render_corruption(results))
    lines.append(render_cost(json.loads(COST.read_text(encoding="utf-8"))))
    lines += ["", describe_making(results)]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    with open_atomic(PAGE) as file:
        file.write(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
