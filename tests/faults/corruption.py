"""Corruption of every file of a finished run, a published and an exported one: ``python -m tests.faults.corruption``.

Each case damages one file of a copy and uses the copy as its owner would (``corruption_uses``). The use must refuse it
in words, heal it, or come to the very result of the whole folder. Cases run in forked processes, in an order drawn from
the seed. Counts go to tests/faults/results.json; the same command resumes where it stopped.

    python -m tests.faults.corruption [--run RUN] [--processes 2] [--minutes 30] [--seed 0]

Exit code 0: all cases are done and none failed; 1: some failed; 75: the time limit was reached.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from collm_dist.errors import CollmError, InternalError
from collm_dist.runs.atomic_files import write_json
from tests.faults.corruption_uses import USES, Bench, make_bench, use_copy
from tests.faults.forked_cases import Outcome, obey_modes, run_forked

RESULTS = Path(__file__).with_name("results.json")
WAYS = ("cut", "emptied", "flipped", "junk", "gone", "directory", "dangling link", "unreadable")
# Ways in which a use sees each file damaged, drawn from the seed; 1 / 3: every third file in one way. All are tried by
# --every-way. An evaluation takes seconds instead of milliseconds.
WAYS_OF_USE = {"load": 4, "publish": 3, "export": 3, "evaluate": 1 / 3, "resume": 3, "load published": 4,
               "publish again": 3, "import": 8}  # fmt: skip
OUTCOMES = ("refused", "healed", "without effect", "different", "traceback", "hang", "crash", "skipped")
CASES_PER_RECORD = 50
FAILURES = ("different", "traceback", "hang", "crash")


@dataclass(frozen=True)
class Case:
    """A use of a folder one file of which is damaged."""

    use: str
    file: str
    way: str


def damage(path: Path, way: str, dice: random.Random) -> None:
    """Damage a file in one of ``WAYS``."""
    data = bytearray(path.read_bytes())
    if way == "cut":
        path.write_bytes(data[: dice.randrange(len(data))])
    elif way == "emptied":
        path.write_bytes(b"")
    elif way == "flipped":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
    elif way == "junk":
        path.write_bytes(dice.randbytes(len(data)))
    elif way == "unreadable":
        path.chmod(0)
    else:
        path.unlink()
        if way == "directory":
            path.mkdir()
        elif way == "dangling link":
            path.symlink_to(path.with_name("nowhere"))


def list_files(folder: Path) -> list[str]:
    """Return the files of a folder that are not empty."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size)
    return [path.as_posix() for path in paths]


def list_cases(bench: Bench, seed: int, *, every_way: bool) -> list[Case]:
    """Return cases of every use and file, with the ways of ``WAYS_OF_USE`` or all, in an order drawn from the seed."""
    cases = []
    for use, (kind, _) in USES.items():
        for file in list_files(bench.folders[kind]):
            dice = random.Random(f"{seed} {use} {_name_lasting(file)}")
            number = len(WAYS) if every_way else WAYS_OF_USE[use]
            number = int(number) if number >= 1 else int(dice.random() < number)
            cases += [Case(use, file, way) for way in dice.sample(WAYS, number)]
    random.Random(seed).shuffle(cases)
    return cases


def _name_lasting(file: str) -> str:
    """Return the name of a file without the time and process that TensorBoard's names have."""
    return file.split(".out.tfevents.")[0]


def run_case(bench: Bench, case: Case, expected: Any, seed: int, scratch: Path) -> Outcome:
    """Damage a file of a copy and use the copy."""
    damaged: dict[str, bytes | None] = {}

    def change(copy: Path) -> None:
        path = copy / case.file
        damage(path, case.way, random.Random(f"{seed} {case.use} {_name_lasting(case.file)} {case.way}"))
        damaged["before"] = _read(path)

    if case.way == "unreadable" and (reason := obey_modes()) is not None:
        return "skipped", reason
    try:
        result = use_copy(bench, case.use, scratch, change)
    except InternalError as error:
        return "traceback", str(error)
    except CollmError as error:
        return ("refused" if error.exit_code in (2, 3) and str(error) else "traceback"), str(error)
    except Exception as error:
        lines = traceback.format_exception(error)
        return "traceback", "".join(lines[-3:])
    if result != expected:
        return "different", _find_difference(expected, result)
    return ("without effect" if _read(scratch / "copy" / case.file) == damaged["before"] else "healed"), ""


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _find_difference(expected: Any, result: Any) -> str:
    """Return the files that differ between two descriptions, or what kind of value does."""
    if isinstance(expected, list) and isinstance(result, list) and len(expected) == len(result):
        return ", ".join(_find_difference(*pair) for pair in zip(expected, result, strict=True) if pair[0] != pair[1])[
            :200
        ]
    if isinstance(expected, dict) and isinstance(result, dict):
        return ", ".join(name for name in sorted({*expected, *result}) if expected.get(name) != result.get(name))
    return f"{expected} is {result}"


def run_cases(
    bench: Bench, cases: Sequence[Case], seed: int, folder: Path, processes: int = 1, deadline: float = float("inf")
) -> Iterator[tuple[Case, Outcome]]:
    """Run cases in forked processes and yield them with their outcomes, in order."""
    expected = {use: use_copy(bench, use, folder / "whole") for use in dict.fromkeys(case.use for case in cases)}
    calls: list[Callable[[], Outcome]] = [
        partial(run_case, bench, case, expected[case.use], seed, folder / f"{number}-case" / "scratch")
        for number, case in enumerate(cases)
    ]
    yield from zip(cases, run_forked(calls, folder, processes, deadline), strict=False)


def count(found: dict[str, Any], case: Case, outcome: Outcome) -> None:
    """Add a case to the counts of a corruption run."""
    found["corruptions"] += 1
    uses = found["uses"].setdefault(case.use, dict.fromkeys(OUTCOMES, 0))
    uses[outcome[0]] += 1
    if outcome[0] in FAILURES:
        found["failures"].append({"use": case.use, "file": case.file, "way": case.way, "outcome": outcome[0],
                                  "message": outcome[1][:600]})  # fmt: skip


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Return the counts with sums over all uses."""
    sums: Counter[str] = Counter()
    for counts in found["uses"].values():
        sums.update(counts)
    return found | {
        "refused": sums["refused"],
        "healed": sums["healed"],
        "without_effect": sums["without effect"],
        "skipped": sums["skipped"],
        "silently_different": sums["different"],
        "tracebacks": sums["traceback"] + sums["hang"] + sums["crash"],
    }


def save(path: Path, results: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Write the counts beside the suite's other results, and return them with their sums."""
    found = summarize(found)
    totals = {key: found[key] for key in ("corruptions", "silently_different", "tracebacks")}
    write_json(path, results | totals | {"corruption": found})
    return found


def begin(results: dict[str, Any], seed: int, total: int) -> dict[str, Any]:
    """Return the progress of a corruption run with this seed and number of cases, else a new one."""
    found: dict[str, Any] = results.get("corruption", {})
    if (found.get("seed"), found.get("total")) == (seed, total) and found["corruptions"] < total:
        return found
    return {"seed": seed, "total": total, "corruptions": 0, "uses": {}, "failures": []}


def main() -> int:
    """Run the missing cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished tiny run; default: made here")
    parser.add_argument("--processes", type=int, default=1, help="cases at the same time")
    parser.add_argument("--every-way", action="store_true", help="damage each file in all ways for each use")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, to go on later")
    parser.add_argument("--uses", nargs="+", default=list(USES), choices=list(USES), help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["DS_ACCELERATOR"] = "cpu"
    results = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.exists() else {}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="corruption-", dir=memory) as name:
        folder, run = Path(name), arguments.run
        if run is None:
            from tests.faults.__main__ import prepare

            prepare(folder)
            run = folder / "pipeline"
        bench = make_bench(run, folder)
        cases = [
            case
            for case in list_cases(bench, arguments.seed, every_way=arguments.every_way)
            if case.use in arguments.uses
        ]
        found = begin(results, arguments.seed, len(cases))
        missing = cases[found["corruptions"] :]
        running = run_cases(bench, missing, arguments.seed, folder / "cases", arguments.processes, deadline)
        for case, outcome in tqdm(running, total=len(missing), unit="case", disable=None):
            count(found, case, outcome)
            if outcome[0] in FAILURES:
                print(f"{case}: {outcome[0]}: {outcome[1]}", flush=True)
            if found["corruptions"] % CASES_PER_RECORD == 0:
                save(arguments.results, results, found)
    found = save(arguments.results, results, found)
    print(json.dumps({key: value for key, value in found.items() if key != "failures"}, indent=2))
    if found["failures"]:
        return 1
    return 0 if found["corruptions"] == len(cases) else 75


if __name__ == "__main__":
    sys.exit(main())
