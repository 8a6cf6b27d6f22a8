"""Mutated files through the readers, mutated settings through the config loader: no traceback, no hang.

    python -m tests.faults.fuzz [--seconds 300] [--seed 0]

Every case must be read, or be refused by a CollmError, within ten seconds. Counts go to tests/faults/fuzz.json; exit
code 1 where a case did anything else, with the case kept in a folder that the output names.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import importlib.metadata
import io
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from collm_dist.artifacts import write_json
from collm_dist.config import DatasetConfig
from collm_dist.config_io import load_config
from collm_dist.data.readers import open_source
from collm_dist.errors import CollmError

RESULTS = Path(__file__).with_name("fuzz.json")
CONFIGS = Path(__file__).parents[2] / "configs"
LIMIT_SECONDS = 10
# What makes parsers stumble: delimiters, quotes, marks, numbers at their limits, YAML's own signs.
MORSELS = [
    b"", b'"', b'""', b",", b"\n", b"\r", b"\t", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"'", b"\\",
    b"{", b"}", b"[", b"]", b": ", b"&a *a", b"!!python/object:os.system", b"<<: *stage", b"null", b"NaN", b"inf",
    b"-1", b"1e999", b"9223372036854775808", b"0x10", b"2020-02-30", b"~", b"- ", b"#", b"%", b"\xed\xa0\x80",
    b"x" * 4096,
]  # fmt: skip


def mutate(data: bytes, dice: random.Random) -> bytes:
    """Return bytes with a few pieces flipped, cut, doubled, moved, or replaced by a morsel."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        at = dice.randrange(len(changed) + 1)
        length = dice.choice((0, 1, 1, 4, 64))
        way = dice.randrange(5)
        if way == 0 and at < len(changed):
            changed[at] ^= 1 << dice.randrange(8)
        elif way == 1:
            del changed[at : at + length]
        elif way == 2:
            changed[at:at] = changed[at : at + length] * dice.choice((1, 2, 50))
        elif way == 3:
            changed[at : at + length] = dice.choice(MORSELS)
        elif dice.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def make_rows(dice: random.Random) -> list[dict[str, Any]]:
    """Return some rows of a log."""
    return [
        {"user_id": f"u{dice.randrange(9)}", "item_id": f"i{dice.randrange(9)}", "timestamp": 10**9 + number,
         "rating": dice.randrange(1, 6)}
        for number in range(dice.randrange(1, 30))
    ]  # fmt: skip


def write_text(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as CSV."""
    return ("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n").encode()


def write_lines(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as Parquet."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def read_everything(path: Path) -> None:
    """Read a log as preprocessing does, and as an item file."""
    dataset: dict[str, Any] = {"path": str(path), "columns": {"rating": "rating"}, "items_path": str(path)}
    source = open_source(DatasetConfig.model_validate(dataset | {"item_columns": {"title": "user_id"}}))
    for chunk in source.chunks:
        for _ in source.read_chunk(chunk):
            pass
    source.read_items()
    source.inputs()


def fuzz_reader(suffix: str, write: Callable[[list[dict[str, Any]]], bytes], pack: Callable[[bytes], bytes]) -> Any:
    """Return a fuzzer of one format: it makes a file, and reads it."""

    def make(dice: random.Random, folder: Path) -> Path:
        path = folder / f"log{suffix}"
        data = write(make_rows(dice))
        # Either the content is wrong, or what it is packed in.
        path.write_bytes(pack(mutate(data, dice)) if dice.random() < 0.7 else mutate(pack(data), dice))
        return path

    return make, read_everything


def fuzz_config() -> Any:
    """Return a fuzzer of the config loader."""
    texts = [path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"))]

    def make(dice: random.Random, folder: Path) -> Path:
        path = folder / "config.yaml"
        path.write_bytes(mutate(dice.choice(texts), dice))
        return path

    return make, load_config


def keep(data: bytes) -> bytes:
    """Return the data unpacked."""
    return data


FUZZERS: dict[str, Callable[[], Any]] = {
    "csv": lambda: fuzz_reader(".csv", write_text, keep),
    "csv.gz": lambda: fuzz_reader(".csv.gz", write_text, gzip.compress),
    "csv.bz2": lambda: fuzz_reader(".csv.bz2", write_text, bz2.compress),
    "jsonl": lambda: fuzz_reader(".jsonl", write_lines, keep),
    "parquet": lambda: fuzz_reader(".parquet", write_parquet, keep),
    "config": fuzz_config,
}


class Hang(BaseException):
    """A case took too long. No Exception, so that nothing swallows it."""


def _give_up(signum: int, frame: FrameType | None) -> None:
    raise Hang


def fuzz(name: str, folder: Path, *, seed: int, most: int, seconds: float) -> dict[str, Any]:
    """Run cases of a fuzzer and count how they end.

    Args:
        name: one of FUZZERS.
        folder: for the files; those that did harm stay.
        seed: of the mutations.
        most: cases.
        seconds: in all.

    Returns:
        ``{cases, read, refused, faults}``; faults are texts.
    """
    make, use = FUZZERS[name]()
    ends: Counter[str] = Counter()
    faults: list[str] = []
    started, previous = time.monotonic(), signal.signal(signal.SIGALRM, _give_up)
    try:
        while sum(ends.values()) < most and time.monotonic() < started + seconds:
            number = sum(ends.values())
            path = make(random.Random(f"{seed} {name} {number}"), folder)
            signal.alarm(LIMIT_SECONDS)
            try:
                use(path)
                ends["read"] += 1
            except CollmError:
                ends["refused"] += 1
            except (Exception, Hang) as error:
                ends["fault"] += 1
                kept = path.rename(path.with_name(f"fault-{number}-{path.name}"))
                faults.append(f"{kept}: {traceback.format_exception(error)[-1].strip()[:500]}")
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    return {"cases": sum(ends.values()), "read": ends["read"], "refused": ends["refused"], "faults": faults}


def main() -> int:
    """Fuzz everything for equal times; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    share = arguments.seconds / len(FUZZERS)
    versions = {name: importlib.metadata.version(name) for name in ("pyarrow", "pydantic", "pyyaml")}
    results: dict[str, Any] = {"seed": arguments.seed, "seconds": arguments.seconds, "versions": versions}
    results["fuzzers"] = {}
    for name in tqdm(FUZZERS, desc="fuzz"):
        found = fuzz(name, folder, seed=arguments.seed, most=sys.maxsize, seconds=share)
        results["fuzzers"][name] = {**found, "faults": len(found["faults"])}
        for fault in found["faults"][:10]:
            print(f"{name}: {fault}")
    write_json(arguments.results, results)
    faults = sum(found["faults"] for found in results["fuzzers"].values())
    print(f"{sum(found['cases'] for found in results['fuzzers'].values()):,} cases, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
