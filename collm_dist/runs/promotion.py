"""Promotion of a finished run to the run in use, by a configured rule on its report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collm_dist.config import Config
from collm_dist.config.yaml_file import get_text, read_yaml
from collm_dist.errors import ArtifactError, ConfigError
from collm_dist.runs.atomic_files import explain_disk_errors, write_json
from collm_dist.runs.run_dir import RunDir, normalize

RECORD = "promotion.json"
_FIRST = "no earlier run to compare with"


def find_pointer(config: Config) -> Path:
    """Return the symbolic link to the run in use."""
    if config.promotion.pointer is not None:
        return Path(config.promotion.pointer)
    return normalize(Path(config.run.dir)).parent / "current"


def pin_previous(config: Config) -> Config:
    """Replace a link in ``dataset.extend_from`` with its target, and keep that target for the life of this run.

    A later promotion, possibly of this run, changes the link. If the link is the promotion pointer and does not exist
    yet, this is the first run and extends nothing.

    Raises:
        ConfigError: the link leads to this run, which did not start as an extension of another run; or to another run,
            but this one began without an extension and is not known as the first run; or the run's config.yaml is
            damaged.
    """
    name, run_dir = config.dataset.extend_from, Path(config.run.dir)
    if name is None:
        return config
    path, recorded = Path(name), run_dir / "config.yaml"
    is_pointer = path.absolute() == find_pointer(config).absolute()
    if not path.is_symlink() and not (is_pointer and not path.exists()):
        return config
    if recorded.exists():
        previous = get_text(read_yaml(recorded), "dataset", "extend_from")
        if previous is None and path.exists() and path.resolve() != run_dir.resolve():
            _check_first(config, path)
    elif path.exists():
        previous = str(path.resolve())
    else:
        previous = None
        print(
            f"dataset.extend_from: {name} does not exist yet, so this run extends no other run; the first promotion "
            "creates it (promotion.min_paired_difference)",
            flush=True,
        )
    if previous is not None and Path(previous).resolve() == run_dir.resolve():
        raise ConfigError(
            f"dataset.extend_from: '{name}' leads to this very run, {run_dir}; set run.dir to a new directory"
        )
    return config.model_copy(update={"dataset": config.dataset.model_copy(update={"extend_from": previous})})


def _check_first(config: Config, link: Path) -> None:
    """Refuse a run that began without ``dataset.extend_from`` if another run is in use: it would not be compared.

    The first run of all is accepted, and so is a run that was decided with another baseline than the previous run.
    """
    decision = _read_decision(Path(config.run.dir) / RECORD)
    if decision is None or (config.promotion.baseline == "previous" and decision.get("reason") != _FIRST):
        raise ConfigError(
            f"dataset.extend_from: '{link}' leads to {link.resolve()}, but the run in {config.run.dir} was begun "
            "without dataset.extend_from; set run.dir to a new directory to extend that run, or "
            "dataset.extend_from=null to go on without a comparison"
        )


def _read_decision(path: Path) -> dict[str, Any] | None:
    """Return a recorded decision; None if there is none, or it is damaged."""
    try:
        decision = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return decision if isinstance(decision, dict) else None


def decide(config: Config, report: Mapping[str, Any]) -> dict[str, Any]:
    """Apply the rule to a report.

    Args:
        config: configuration with ``promotion.min_paired_difference``.
        report: report of the evaluation.

    Returns:
        ``{state, metric, baseline, difference, low, high, min_paired_difference, reason}``; state is promoted or
        rejected.

    Raises:
        ArtifactError: the report does not compare stage 2 with the baseline.
    """
    rule = config.promotion
    decision: dict[str, Any] = {"metric": rule.metric, "baseline": rule.baseline,
                                "min_paired_difference": rule.min_paired_difference}  # fmt: skip
    if rule.baseline == "previous" and config.dataset.extend_from is None:
        return decision | {"state": "promoted", "reason": _FIRST}
    versus = report["anchor"] if rule.baseline == "anchor" else rule.baseline
    key = {"split": "test", "slice": "all", "model": "stage2", "versus": versus}
    difference: Mapping[str, Any] = next((row for row in report["differences"] if key.items() <= row.items()), {})
    low = difference.get(f"{rule.metric}_low")
    if low is None:
        raise ArtifactError(
            f"promotion: the report has no interval for stage 2 against {rule.baseline} in {rule.metric} on test: "
            f"{report['left_out'].get(rule.baseline, 'too few users or rows')}"
        )
    passes = low >= rule.min_paired_difference
    reason = (
        f"stage 2 less {rule.baseline}, {rule.metric} on {difference['rows']:,} test rows: "
        f"{difference[rule.metric]:+.4f} [{low:+.4f}, {difference[f'{rule.metric}_high']:+.4f}]; "
        f"its lower end is {'not ' * (not passes)}at least {rule.min_paired_difference:+g}"
    )
    numbers = {"difference": difference[rule.metric], "low": low, "high": difference[f"{rule.metric}_high"]}
    return decision | numbers | {"state": "promoted" if passes else "rejected", "reason": reason}


def _keep_in_use(config: Config, run_dir: RunDir, decision: dict[str, Any]) -> dict[str, Any]:
    """Return the decision; rejected if the run would replace another run than the one that it was compared with.

    The run in use changes while a run is made, and ``dataset.extend_from`` may name a fixed run.
    """
    pointer, previous = find_pointer(config), config.dataset.extend_from
    if decision["state"] == "rejected" or config.promotion.baseline != "previous":
        return decision
    if not (pointer.is_symlink() and pointer.exists()):
        return decision
    compared = None if previous is None else Path(previous).resolve()
    in_use = pointer.resolve()
    if in_use in (compared, run_dir.path.resolve()):
        return decision
    reason = (
        f"{pointer} leads to {in_use}, but this run was compared with {compared or 'no earlier run'}; to compare it "
        f"with the run in use, make a run in a new run.dir with dataset.extend_from={pointer}"
    )
    return decision | {"state": "rejected", "reason": reason}


def promote(config: Config, run_dir: RunDir) -> dict[str, Any]:
    """Decide about a finished run, write ``promotion.json``, and if promoted move the pointer to it.

    With the baseline ``previous``, a run replaces only the run that it was compared with. A recorded decision about the
    same report is kept: the pointer does not move again, wherever it points by now.

    Raises:
        ArtifactError: see ``decide``; or the pointer's path exists and is not a symbolic link.
        DiskError: the record or the link cannot be written.
    """
    report, path = run_dir.read_record("eval"), run_dir.path / RECORD
    decision = decide(config, report) | {"report": report["content_hash"]}
    if _read_decision(path) == decision:  # a damaged record is written again
        return decision
    decision = _keep_in_use(config, run_dir, decision)
    if decision["state"] == "promoted":
        move_pointer(find_pointer(config), run_dir.path)
    write_json(path, decision)
    return decision


def move_pointer(pointer: Path, target: Path) -> None:
    """Point a symbolic link to a run, atomically.

    Raises:
        ArtifactError: the path exists and is not a symbolic link.
    """
    if pointer.exists() and not pointer.is_symlink():
        raise ArtifactError(f"promotion.pointer: {pointer} is not a symbolic link; move it away or set another path")
    temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}")
    with explain_disk_errors(pointer):
        pointer.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target.resolve(), pointer.parent.resolve()), target_is_directory=True)
        temporary.replace(pointer)
