"""Corruption of every file of a finished run and of its export, in this process: ``python -m tests.faults.corruption``.

Each case damages one file, loads the run (or imports the export and loads that) and scores requests. It must be refused
in words, or give the very scores of the whole run. Counts go to tests/faults/results.json.

    python -m tests.faults.corruption [--run RUN] [--repeats 1] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from collm_dist import RankingRequest, load_recommender
from collm_dist.config.loader import load_config
from collm_dist.errors import CollmError, InternalError
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.model_card import Licences

RESULTS = Path(__file__).with_name("results.json")
WAYS = ("cut", "emptied", "flipped", "junk", "gone", "directory", "dangling link")
# Not state of a run: written for people, or kept to resume a stage that is done.
_UNUSED = ("tensorboard", "checkpoints", "shards")


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
    else:
        path.unlink()
        if way == "directory":
            path.mkdir()
        elif way == "dangling link":
            path.symlink_to(path.with_name("nowhere"))


def list_files(folder: Path) -> list[str]:
    """Return the files of a run or an export that are not empty, without those that no reader opens."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size)
    return [str(path) for path in paths if not set(path.parts) & set(_UNUSED) and path.name != ".hashes.json"]


def choose_requests(run: Path) -> list[RankingRequest]:
    """Return requests of a known user, of a history and of a stranger."""
    recommender = load_recommender(run, "cpu")
    items, user = recommender.item_ids[:10], recommender.user_ids[0]
    histories: list[tuple[str | None, list[str] | None]] = [(user, None), (None, items[2:5]), ("nobody", items[:2])]
    return [RankingRequest(name, history, items) for name, history in histories]


class Bench:
    """A whole run or export, and what loading it gives."""

    def __init__(self, whole: Path, scratch: Path, requests: Sequence[RankingRequest], *, is_export: bool) -> None:
        """Score the requests with the whole folder."""
        self.whole, self.scratch, self.requests, self.is_export = whole, scratch, requests, is_export
        self.expected = self._score(whole)

    def _score(self, folder: Path) -> np.ndarray[Any, Any]:
        run = folder
        if self.is_export:
            run = self.scratch / "imported"
            shutil.rmtree(run, ignore_errors=True)
            import_model(folder, RunDir(run))
        return np.concatenate(load_recommender(run, "cpu").score(self.requests))

    def try_case(self, name: str, way: str, dice: random.Random) -> tuple[str, str]:
        """Damage a file of a copy and score.

        Returns:
            refused, same, different or traceback; and the message.
        """
        copy = self.scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.whole, copy)
        damage(copy / name, way, dice)
        try:
            scores = self._score(copy)
        except InternalError as error:
            return "traceback", f"{type(error).__name__}: {error}"
        except CollmError as error:
            return ("refused" if error.exit_code == 2 and str(error) else "traceback"), str(error)
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {error}"
        return ("same" if np.array_equal(scores, self.expected) else "different"), ""


def make_benches(run: Path, folder: Path) -> dict[str, Bench]:
    """Export a run and return a bench for the run and one for the export."""
    requests = choose_requests(run)
    exported = export_model(
        load_config(run / "config.yaml"), RunDir(run), folder / "exported", Licences("none", "none", "none")
    )
    for name in ("of-run", "of-export"):
        (folder / name).mkdir()
    return {
        "run": Bench(run, folder / "of-run", requests, is_export=False),
        "export": Bench(exported, folder / "of-export", requests, is_export=True),
    }


def run_cases(
    benches: dict[str, Bench],
    seed: int,
    repeats: int,
    keep: Callable[[str, str, str], bool] = lambda *_: True,
) -> dict[str, Any]:
    """Damage every file in every way.

    Args:
        benches: of ``make_benches``.
        seed: of the damage.
        repeats: damage of each kind per file.
        keep: takes kind, file and way and returns whether to run the case.
    """
    cases = [
        (kind, name, way, repeat)
        for kind, bench in benches.items()
        for name in list_files(bench.whole)
        for way in WAYS
        for repeat in range(repeats if way in ("cut", "flipped", "junk") else 1)
        if keep(kind, name, way)
    ]
    counts: Counter[str] = Counter()
    failures = []
    for kind, name, way, repeat in tqdm(cases, unit="case", disable=None):
        outcome, message = benches[kind].try_case(name, way, random.Random(f"{seed} {kind} {name} {way} {repeat}"))
        counts[outcome] += 1
        if outcome in ("different", "traceback"):
            failures.append({"file": f"{kind}/{name}", "way": way, "outcome": outcome, "message": message[:300]})
    return {
        "seed": seed,
        "corruptions": len(cases),
        "refused": counts["refused"],
        "without_effect": counts["same"],
        "silently_different": counts["different"],
        "tracebacks": counts["traceback"],
        "failures": failures,
    }


def main() -> int:
    """Run all cases; returns 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished tiny run; default: made here")
    parser.add_argument("--repeats", type=int, default=1, help="random damage of each kind per file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="corruption-") as name:
        folder = Path(name)
        run = arguments.run
        if run is None:
            from tests.faults.__main__ import prepare

            prepare(folder)
            run = folder / "pipeline"
        found = run_cases(make_benches(run, folder), arguments.seed, arguments.repeats)
    results = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.exists() else {}
    totals = {key: found[key] for key in ("corruptions", "silently_different", "tracebacks")}
    write_json(arguments.results, results | totals | {"corruption": found})
    print(json.dumps(found, indent=2))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
