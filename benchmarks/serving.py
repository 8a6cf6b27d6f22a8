"""How many requests per second does the HTTP service answer, with batching and without?

    python -m benchmarks.serving --data DIR --runs DIR [--cases tiny smollm2] [--seconds 60] [--output FOLDER]

The data are those of benchmarks/ranking.py; the run of each case is created in --runs unless it exists. launch/serve.py
then runs on the loopback address, first with its defaults and then with ``--max-batch-size 1``. Each client has a
connection of its own and sends its next request as soon as it has an answer; clients and service share the cores. A
request holds a new history, or a user of the log, and new candidates; one in twenty is malformed and must be answered
with 4xx. The first seconds are a warm-up. Writes serve_<device>.json; cases that are not run keep their entries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks import ranking
from benchmarks.lib.machine import RESULTS, ROOT, TUNING_PACKAGES, describe_run, name_device
from collm_dist.data.shards.interactions import load_item_table, load_user_ids
from collm_dist.runs.atomic_files import write_json

SIDES = {"batched": [], "one by one": ["--max-batch-size", "1"]}
WARM_UP_SECONDS, MALFORMED_SHARE, HISTORY_LENGTH = 3, 0.05, 10
MALFORMED = (
    b"",
    b"{",
    b"[]",
    b'{"history": "B004"}',
    b'{"history": [1.5], "candidates": ["1"]}',
    b'{"user": "1", "candidates": []}',
    b'{"history": [], "candidates": ["no such item"]}',
    b'{"user": "1", "top_k": 0}',
    b'{"user": "1", "color": "red"}',
    b'{"history": [' + b"1," * (256 << 10) + b"1]}",
    b"[" * 50_000,
    b'{"history": ["\xff"]}',
)


@dataclass(frozen=True)
class Load:
    """Number of clients, and of candidates per request."""

    clients: int
    candidates: int


LOADS = {"tiny": Load(32, 20), "smollm2": Load(4, 10)}


@contextmanager
def run_service(run: Path, options: list[str]) -> Iterator[str]:
    """Run the service as a user would, and yield its address.

    Raises:
        SystemExit: the service has not started, or has ended with an error.
    """
    command = [sys.executable, "launch/serve.py", "--config", str(run / "config.yaml"), "--port", "0", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("serving ")), "")
            address = re.search(r"http://\S+", line)
            if address is None:
                raise SystemExit("the service has not started")
            yield address.group()
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(120) != 0:
                raise SystemExit(f"the service has ended with code {process.returncode}")


class RequestSource:
    """Random request bodies, the same for both sides."""

    def __init__(self, run: Path, candidates: int) -> None:
        self.items = load_item_table(run / "data")["item_id"]
        self.users = load_user_ids(run / "data")
        self.candidates = candidates

    def draw(self, random: np.random.Generator) -> tuple[bytes, bool]:
        """Return a request body and whether it is well-formed."""
        if random.random() < MALFORMED_SHARE:
            return MALFORMED[random.integers(len(MALFORMED))], False
        drawn = random.choice(len(self.items), HISTORY_LENGTH + self.candidates, replace=False).tolist()
        names = [self.items[item] for item in drawn]
        body: dict[str, Any] = {"candidates": names[HISTORY_LENGTH:]}
        if random.random() < 0.5:
            body["history"] = names[:HISTORY_LENGTH]
        else:
            body["user"] = self.users[random.integers(len(self.users))]
        return json.dumps(body).encode(), True


async def send_requests(
    address: str, source: RequestSource, clients: int, seconds: float, seed: int
) -> list[dict[str, Any]]:
    """Let clients send requests until the time is over; return the outcome of each request."""
    answers: list[dict[str, Any]] = []
    end = time.perf_counter() + seconds

    async def run_client(session: aiohttp.ClientSession, number: int) -> None:
        random = np.random.default_rng([seed, number])
        while time.perf_counter() < end:
            body, is_good = source.draw(random)
            started = time.perf_counter()
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{address}/rank", data=body, headers=headers) as response:
                text = await response.read()
                took = time.perf_counter() - started
                timing = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers.get("Server-Timing", "")))
                size = int(response.headers.get("X-Scored-Together", 0))
            complete = "detail" in json.loads(text) if response.status != 200 else is_good
            answers.append({"good": is_good, "status": response.status, "ms": 1000 * took, "size": size,
                            "complete": complete, **{name: float(ms) for name, ms in timing.items()}})  # fmt: skip

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=clients), timeout=aiohttp.ClientTimeout(300)
    ) as session:
        await asyncio.gather(*(run_client(session, number) for number in range(clients)))
    return answers


def summarize(answers: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return rates, quantiles of the times of well-formed requests, batch sizes and errors."""
    good = [answer for answer in answers if answer["good"]]
    bad = [answer for answer in answers if not answer["good"]]
    answered = [answer for answer in good if answer["status"] == 200]
    times, sizes = np.array([answer["ms"] for answer in answered]), np.array([answer["size"] for answer in answered])
    statuses = Counter(answer["status"] for answer in answers)
    p50, p95, p99 = np.percentile(times, [50, 95, 99]).tolist()
    return {
        "seconds": seconds,
        "requests": len(answers),
        "answered": len(answered),
        "requests_per_second": len(answered) / seconds,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "queue_ms_mean": float(np.mean([answer["queue"] for answer in answered])),
        "pass_ms_mean": float(np.mean([answer["score"] for answer in answered])),
        "passes": float((1 / sizes).sum()),
        "requests_per_pass_mean": float(len(sizes) / (1 / sizes).sum()),
        "requests_by_size_of_pass": {str(size): count for size, count in sorted(Counter(sizes.tolist()).items())},
        "errors": len(good) - len(answered),
        "malformed": len(bad),
        "malformed_answered_4xx": sum(400 <= answer["status"] < 500 and answer["complete"] for answer in bad),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
    }


def measure(run: Path, load: Load, seconds: float) -> dict[str, Any]:
    """Put the load on both sides, one after the other."""
    source = RequestSource(run, load.candidates)
    sides: dict[str, Any] = {}
    for side, options in SIDES.items():
        with run_service(run, options) as address:
            asyncio.run(send_requests(address, source, load.clients, WARM_UP_SECONDS, seed=0))
            started = time.perf_counter()
            answers = asyncio.run(send_requests(address, source, load.clients, seconds, seed=1))
            sides[side] = summarize(answers, time.perf_counter() - started)
        result = sides[side]
        times = f"p50 {result['p50_ms']:.0f}, p99 {result['p99_ms']:.0f} ms"
        print(
            f"{side}: {result['requests_per_second']:.1f}/s, {times}, "
            f"{result['requests_per_pass_mean']:.1f} requests a pass, {result['errors']} errors, "
            f"{result['malformed_answered_4xx']} of {result['malformed']} malformed answered 4xx",
            flush=True,
        )
    on, off = sides["batched"], sides["one by one"]
    ratio = {
        "requests_per_second": on["requests_per_second"] / off["requests_per_second"],
        "p50_ms": on["p50_ms"] / off["p50_ms"],
        "p99_ms": on["p99_ms"] / off["p99_ms"],
    }
    return {"load": asdict(load), "sides": sides, "ratio": ratio}


def find_run(name: str, data: Path, runs: Path, overrides: list[str]) -> Path:
    """Return the run of a case, created unless it exists."""
    folder = runs / name
    if not (folder / "run" / "stage2" / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        ranking.build_run(ranking.CASES[name], data, folder, overrides)
    return folder / "run"


def main() -> None:
    """Measure case after case; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the cases' runs")
    parser.add_argument("--cases", nargs="+", default=list(LOADS), choices=LOADS)
    parser.add_argument("--seconds", type=float, default=60, help="of the load on each side; 0 only creates the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the runs")
    arguments = parser.parse_args()
    path = arguments.output / f"serve_{name_device()}.json"
    cases: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    for name in arguments.cases:
        run = find_run(name, arguments.data, arguments.runs.resolve(), arguments.overrides)
        if not arguments.seconds:
            continue
        cases[name] = {
            "backbone": ranking.CASES[name].backbone or "random, 2 layers of width 64",
            **measure(run, LOADS[name], arguments.seconds),
        }
        record = {
            "question": __doc__.splitlines()[0],
            "ratio": {case: values["ratio"] for case, values in cases.items()},
            "cases": cases,
            "config": {"seconds": arguments.seconds, "threads": os.cpu_count(), "history": HISTORY_LENGTH,
                       "malformed_share": MALFORMED_SHARE},
            **describe_run(*TUNING_PACKAGES, "ray", "fastapi", "uvicorn"),
        }  # fmt: skip
        write_json(path, record)
        print(f"{name}: { {key: round(value, 2) for key, value in cases[name]['ratio'].items()} }", flush=True)


if __name__ == "__main__":
    main()
