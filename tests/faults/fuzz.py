"""Mutated files through the readers, mutated settings through the config loader: no traceback, no hang.

    python -m tests.faults.fuzz [--seconds 300] [--seed 0]

Within ten seconds, every case must be read or be rejected by a CollmError with exit code 2. Cases run in a process of
their own, of limited memory, so that one that crashes or hangs in a library is counted as well. Counts go to
tests/faults/fuzz.json; exit code 1 where a case did anything else; the output names a folder for the first of a kind.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

from collm_dist.errors import CollmError
from collm_dist.runs.atomic_files import write_json
from tests.faults.fuzz_cases import FUZZERS, Fuzzer

RESULTS = Path(__file__).with_name("fuzz.json")
LIMIT_SECONDS, START_SECONDS = 10, 60
MEMORY_BYTES = 12 << 30
CASES_PER_PROCESS = 1000  # pyarrow keeps the buffer of each compressed file that is found to be damaged


def run_case(fuzzer: Fuzzer, name: str, number: int, seed: int, folder: Path) -> tuple[str, str]:
    """Run a case; return its outcome (read, refused, tracebacks) and the last lines of a traceback."""
    path = fuzzer.make(random.Random(f"{seed} {name} {number}"), folder)
    try:
        fuzzer.use(path)
    except CollmError as error:
        return ("refused", "") if error.exit_code == 2 else ("tracebacks", repr(error))
    except Exception as error:  # the fault to search for
        return "tracebacks", "".join(traceback.format_exception(error)[-2:])[-800:]
    return "read", ""


def fuzz(name: str, folder: Path, *, seed: int, most: int) -> tuple[Counter[str], list[str]]:
    """Run cases of a fuzzer in this process; return counts of outcomes, and tracebacks."""
    fuzzer = FUZZERS[name]()
    found = [run_case(fuzzer, name, number, seed, folder) for number in range(most)]
    return Counter(end for end, _ in found), [text for _, text in found if text]


def _work(connection: Connection, name: str, folder: Path, seed: int, first: int, deadline: float) -> None:
    """Run cases from a number on, reporting the start and outcome of each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("ignore")  # Python's own, of what it parses as a row filter
    fuzzer = FUZZERS[name]()
    for number in range(first, first + CASES_PER_PROCESS):
        if time.monotonic() > deadline:
            break
        connection.send((number, "begins", ""))
        connection.send((number, *run_case(fuzzer, name, number, seed, folder)))
    connection.send(None)


def watch(name: str, folder: Path, seed: int, seconds: float) -> tuple[Counter[str], dict[str, Path]]:
    """Run cases of a fuzzer in processes that may crash or hang; return counts of outcomes, and faults."""
    context = multiprocessing.get_context("spawn")
    deadline, number = time.monotonic() + seconds, 0
    ends: Counter[str] = Counter()
    faults: dict[str, Path] = {}
    while time.monotonic() < deadline:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, name, folder, seed, number, deadline))
        process.start()
        theirs.close()
        patience, end, text = START_SECONDS, "", ""
        while not end:
            try:
                message = ours.recv() if ours.poll(patience) else (number, "hangs", "")
            except EOFError:
                message = (number, "crashes", "")
            if message is None:
                number += 1
                break
            number, state, text = message
            if state in ("hangs", "crashes"):
                end, number = state, number + 1
                process.kill()
            elif state != "begins":
                ends[state] += 1
            if (text or end) and (what := text or f"{end} {len(faults)}") not in faults:
                kept = folder.with_name(f"{name}-{number}".replace(" ", "-"))
                shutil.copytree(folder, kept)
                faults[what] = kept
            patience = LIMIT_SECONDS
        ends[end] += bool(end)
        process.join()
    return +ends, faults


def main() -> int:
    """Run all fuzzers for equal times and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fuzzers", nargs="+", default=list(FUZZERS), choices=list(FUZZERS), help="only these")
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="fuzz-"))
    versions = {name: importlib.metadata.version(name) for name in ("pyarrow", "pandas", "pydantic", "pyyaml")}
    fuzzers: dict[str, dict[str, int]] = {}
    for name in tqdm(arguments.fuzzers, desc="fuzz"):
        folder = base / "case"
        folder.mkdir()
        ends, faults = watch(name, folder, arguments.seed, arguments.seconds / len(arguments.fuzzers))
        shutil.rmtree(folder)
        kinds = ("read", "refused", "tracebacks", "hangs", "crashes")
        fuzzers[name] = {"cases": ends.total(), **{kind: ends[kind] for kind in kinds}}
        for what, kept in list(faults.items())[:10]:
            print(f"{kept}: {what}")
    total = sum((Counter(counts) for counts in fuzzers.values()), Counter[str]())
    counts = {kind: total[kind] for kind in ("cases", "read", "refused", "tracebacks", "hangs", "crashes")}
    settings = {"seconds": arguments.seconds, "seed": arguments.seed, "versions": versions}
    write_json(arguments.results, {**counts, **settings, "fuzzers": fuzzers})
    print(", ".join(f"{count:,} {kind}" for kind, count in counts.items()))
    wrong = counts["tracebacks"] + counts["hangs"] + counts["crashes"]
    if not wrong:
        shutil.rmtree(base)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
