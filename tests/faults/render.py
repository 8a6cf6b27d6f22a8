"""Put the last results of the fault suite into docs/reliability.md: ``python -m tests.faults.render``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from collm_dist.runs.atomic_files import open_atomic

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "reliability.md"
COST = FOLDER.parents[1] / "benchmarks" / "results" / "checkpoint_cost_cpu.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

STAGE = (
    "stage 1, LoRA dropout 0.3, float32, one process: adapter, merged backbone and the losses of all steps are equal"
)
PROMISES = {
    "kill": ("A stage that is killed anywhere goes on bit for bit", f"`kill -9` at random moments; {STAGE}"),
    "pipeline": (
        "A pipeline that is killed anywhere ends with the same artifacts",
        "`kill -9` of `launch/run_pipeline.py` and all processes below it; content hashes of all steps are equal",
    ),
    "damage": (
        "A damaged newest checkpoint is noticed, and the one before taken",
        "after a kill the newest checkpoint is cut or one of its bits flipped; same end, with a warning",
    ),
    "pause": ("A pause changes nothing", "SIGSTOP and SIGCONT at random moments; same end"),
    "disk_full": (
        "A full disk ends a stage with what to do; with space it goes on",
        "a tmpfs of 2 MB is filled while a stage runs; exit code 3, then the same end",
    ),
    "read_only": (
        "So does a directory that becomes read-only",
        "the tmpfs is mounted read-only while a stage runs; exit code 3, then the same end",
    ),
}


def render_faults(results: dict[str, Any]) -> list[str]:
    """Return a table row for each kind of fault that was injected.

    Args:
        results: of the suite.
    """
    lines = []
    for kind, (promise, how) in PROMISES.items():
        found = results["kinds"].get(kind)
        if found is None:
            said = "not run yet"
        elif "skipped" in found:
            said = f"skipped: {found['skipped']}"
        else:
            phases = ", ".join(f"{count} {phase}" for phase, count in sorted(found["phases"].items()))
            said = f"{found['kill_points']} faults, {found['recovered']} recovered, {found['lost']} lost ({phases})"
        lines.append(f"| {promise} | {how} | {said} |")
    return lines


def render_fuzz(results: dict[str, Any]) -> str:
    """Return the table row of the fuzzer.

    Args:
        results: of ``tests.faults.fuzz``.
    """
    said = (
        "{cases:,} cases: {read:,} read, {refused:,} refused with a message, {tracebacks:,} tracebacks, "
        "{hangs:,} hangs, {crashes:,} crashes".format(**results)
    )
    return (
        "| Damaged or hostile files and settings are read or refused with a message; no traceback, no hang, no crash "
        f"| `python -m tests.faults.fuzz`: {len(results['fuzzers'])} readers and loaders, mutated files for "
        f"{results['seconds']:.0f} seconds, at most ten for a case | {said} |"
    )


def render_cost(record: dict[str, Any]) -> str:
    """Return the table row of what all this costs.

    Args:
        record: of ``benchmarks.checkpoint_cost``.
    """
    config, step = record["config"], record["median_step_seconds"]["on"]
    low, high = record["checks_share_of_step_95"]
    return (
        "| A checkpoint stalls training for less than a second, and all this takes less than 2 % of a step "
        f"| `benchmarks/checkpoint_cost.py`: {config['backbone']}, LoRA of rank {config['lora']['rank']}, "
        f"{config['rows_per_step']} rows a step, {config['threads']} thread of {record['hardware']['processor']}; "
        f"steps with all checks and bare ones in turn, {len(record['seconds']['on'])} times "
        f"| stall {record['median_stall_seconds']:.3f} s (longest {record['longest_stall_seconds']:.3f} s) for "
        f"{record['checkpoint_bytes'] / 1e6:.1f} MB; checks {record['checks_share_of_step']:.2%} of a step of "
        f"{step:.2f} s [{low:.2%}, {high:.2%}], a checkpoint every {config['checkpoint_every_steps']} steps "
        f"{record['checkpoints_share_of_step']:.3%} |"
    )


def describe_making(results: dict[str, Any]) -> str:
    """Return how the suite's results came about."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    return (
        f"Kills: {results['kill_points']}, recovered {results['recovered']}, lost {results['lost']}. Seed "
        f"{results['seed']}; {versions}. The seed draws the moments; what is hit then depends on the machine's speed."
    )


def main() -> None:
    """Render."""
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    lines = ["| promise | how it is tested | last result |", "|:--|:--|:--|", *render_faults(results)]
    fuzz = FOLDER / "fuzz.json"
    if fuzz.exists():
        lines.append(render_fuzz(json.loads(fuzz.read_text(encoding="utf-8"))))
    lines.append(render_cost(json.loads(COST.read_text(encoding="utf-8"))))
    lines += ["", describe_making(results)]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    with open_atomic(PAGE) as file:
        file.write(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
