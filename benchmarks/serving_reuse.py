"""How much faster are returning users ranked when a service keeps their contexts?

    python -m benchmarks.serving_reuse [--shape smollm2-135m] [--requests 40] [--threads N] [--output FOLDER]
    python -m benchmarks.serving_reuse --published [--limit-ms 500] [--seconds 10] [--output FOLDER]

The backbone has a published shape and random weights, so no data and no run are needed; titles are random words. A
request asks for the scores of 10 items. For each share of returning users, one client sends request after request; each
is scored without reuse and with it, in turn. Half of the returning users have another event in their history, and a
full prompt drops its oldest title. New users have histories of any length. The result includes the largest difference
between the scores, and the time saved as the service's metric estimates it beside the time saved.

--published is the setting of a large ranking service on GPUs: a backbone of 0.6 billion parameters, prompts of 300
tokens, 10 items a request, 99 % of requests answered within 500 ms. Requests arrive at random at a given rate and are
batched as by the service; the highest rate that holds the limit is found by bisection. Runs on a GPU if there is one;
a small --shape makes it short.

Writes serving_reuse_<device>.json; the part that is not run keeps its entry.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.machine import RESULTS, TUNING_PACKAGES, describe_run, name_device
from benchmarks.lib.random_backbone import SHAPES
from benchmarks.lib.random_replica import RandomReplica, Request, Traffic
from collm_dist.errors import QueueFullError
from collm_dist.llm.packed.kept_contexts import KeptContexts
from collm_dist.runs.atomic_files import write_json
from collm_dist.serving.batching import Batcher, Pass
from collm_dist.serving.block_scorer import Scores
from collm_dist.serving.service_options import ServiceOptions

SHARES = (0.0, 0.5, 0.9)
CANDIDATES, PROMPT_TOKENS = 10, 300
WARM_UP = 2
# Requests that are waiting when a rate is given up, as a multiple of those that the limit allows.
BACKLOG = 3


def measure_returning(replica: RandomReplica, share: float, requests: int, reuse_bytes: int) -> dict[str, Any]:
    """Score requests without reuse and with it, in turn."""
    kept, traffic = KeptContexts(reuse_bytes), Traffic(share, replica.history_length, CANDIDATES, seed=1)
    warm_up = Traffic(0.0, replica.history_length, CANDIDATES, seed=0)
    for _ in range(WARM_UP):
        request = warm_up.draw()
        for side in (None, KeptContexts(reuse_bytes)):
            replica.score([request], side)
    samples: dict[str, list[float]] = {"off": [], "on": []}
    processor_s = {"off": 0.0, "on": 0.0}  # beside other processes it says more than the clock
    loads, largest, score = [], 0.0, 0.0
    for number in range(requests):
        request, scores = traffic.draw(), {}
        for side in ("off", "on") if number % 2 else ("on", "off"):
            started, processor = time.perf_counter(), time.process_time()
            scores[side] = replica.score([request], kept if side == "on" else None)  # on the host when it returns
            samples[side].append(1000 * (time.perf_counter() - started))
            processor_s[side] += time.process_time() - processor
        largest = max(largest, float(np.abs(scores["on"] - scores["off"]).max()))
        score = max(score, float(np.abs(scores["off"]).max()))
        loads.append(round(os.getloadavg()[0], 2))
    counts = kept.take_counts()
    tokens = counts.kept_tokens + counts.computed_tokens
    sides = {side: _summarize(times) for side, times in samples.items()}
    return {
        **sides,
        "ratio": {
            "requests_per_second": sides["on"]["requests_per_second"] / sides["off"]["requests_per_second"],
            "p50_ms": sides["on"]["p50_ms"] / sides["off"]["p50_ms"],
            "p99_ms": sides["on"]["p99_ms"] / sides["off"]["p99_ms"],
            "requests_per_processor_second": processor_s["off"] / processor_s["on"],
        },
        "processor_seconds": processor_s,
        "hit_rate": counts.kept_tokens / tokens,
        "contexts": asdict(counts),
        "kept_bytes": kept.num_bytes,
        "milliseconds_per_context_token": 1000 * kept.token_seconds,
        "saved_ms": {"estimated": 1000 * counts.saved_s, "measured": sum(samples["off"]) - sum(samples["on"])},
        "largest_difference": largest,
        "largest_score": score,
        "load_average": loads,
        "samples_ms": samples,
    }


def _summarize(times: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times, [50, 99]).tolist()
    return {"requests_per_second": 1000 * len(times) / sum(times), "p50_ms": p50, "p99_ms": p99}


async def offer_load(
    replica: RandomReplica, requests: Sequence[Request], rate: float, kept: KeptContexts | None, limit_ms: float
) -> dict[str, Any]:
    """Let requests arrive at random at a rate (per second), and return the times from arrival to answer."""
    options = ServiceOptions()
    batcher: Batcher[Request, Scores] = Batcher(
        lambda batch: np.split(replica.score(batch, kept), len(batch)),
        max_size=options.max_batch_size,
        wait_s=options.batch_wait_ms / 1000,
        max_waiting=max(options.max_waiting, int(BACKLOG * rate * limit_ms / 1000)),
    )
    arrivals = np.random.default_rng(2).exponential(1 / rate, len(requests)).cumsum()
    started = time.perf_counter()

    async def ask(request: Request, arrival: float) -> tuple[float, int]:
        await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
        try:
            answer: Pass[Scores] = await batcher.submit(request)
        except QueueFullError:
            return np.inf, 0
        return 1000 * (time.perf_counter() - started - arrival), answer.size

    answers = await asyncio.gather(*map(ask, requests, arrivals.tolist()))
    times, sizes = np.array([took for took, _ in answers]), [size for _, size in answers if size]
    refused = int(np.isinf(times).sum())
    times = np.minimum(times, 1e6)
    p50, p99 = np.percentile(times, [50, 99], method="higher").tolist()
    return {
        "rate": rate,
        "requests": len(requests),
        "refused": refused,
        "p50_ms": p50,
        "p99_ms": p99,
        "requests_per_pass_mean": len(sizes) / sum(1 / size for size in sizes) if sizes else 0.0,
        "holds": refused == 0 and p99 <= limit_ms,
    }


def find_highest_rate(
    replica: RandomReplica, share: float, reuse_bytes: int, limit_ms: float, seconds: float, trials: int
) -> dict[str, Any]:
    """Return the highest rate at which 99 % of requests are answered within the limit, by bisection."""
    kept = KeptContexts(reuse_bytes) if reuse_bytes else None
    traffic = Traffic(share, replica.history_length, CANDIDATES, seed=1)
    batch_size, took = ServiceOptions().max_batch_size, 0.0
    for _ in range(2):  # the second has warmed up
        batch = [traffic.draw() for _ in range(batch_size)]
        started = time.perf_counter()
        replica.score(batch, kept)
        took = time.perf_counter() - started
    low, high, tried = 0.0, 1.5 * batch_size / took, []
    for _ in range(trials):
        rate = (low + high) / 2
        requests = [traffic.draw() for _ in range(max(5, int(rate * seconds)))]
        found = asyncio.run(offer_load(replica, requests, rate, kept, limit_ms))
        tried.append(found | {"load_average": round(os.getloadavg()[0], 2)})
        low, high = (rate, high) if found["holds"] else (low, rate)
        print(f"  {rate:.1f} requests/s: p99 {found['p99_ms']:.0f} ms, {'holds' if found['holds'] else 'too slow'}")
    counts = None if kept is None else kept.take_counts()
    return {
        "returning": share,
        "reuse_bytes": reuse_bytes,
        "requests_per_second": low,
        "items_per_second": low * CANDIDATES,
        "hit_rate": 0.0 if counts is None else counts.kept_tokens / (counts.kept_tokens + counts.computed_tokens),
        "trials": tried,
    }


def run_returning(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the sides for each share of returning users."""
    replica = RandomReplica(arguments.shape or "smollm2-135m", PROMPT_TOKENS)
    cases = {}
    for share in SHARES:
        case = cases[f"{share:.0%}"] = measure_returning(replica, share, arguments.requests, arguments.reuse_bytes)
        off, on = case["off"], case["on"]
        print(
            f"{share:.0%} returning: {off['requests_per_second']:.2f} and {on['requests_per_second']:.2f} requests/s, "
            f"p50 {off['p50_ms']:.0f} and {on['p50_ms']:.0f} ms, p99 {off['p99_ms']:.0f} and {on['p99_ms']:.0f} ms, "
            f"ratio {case['ratio']['requests_per_second']:.2f} (of processor time "
            f"{case['ratio']['requests_per_processor_second']:.2f}), hit rate {case['hit_rate']:.2f}, "
            f"largest difference {case['largest_difference']:.1e}",
            flush=True,
        )
    return {"returning": {"ratio": {name: case["ratio"] for name, case in cases.items()}, "cases": cases,
                          **_describe(replica, arguments.shape or "smollm2-135m", arguments)}}  # fmt: skip


def run_published(arguments: argparse.Namespace) -> dict[str, Any]:
    """Find the highest rate without reuse, and with it for each share of returning users."""
    shape = arguments.shape or "qwen3-0.6b"
    replica = RandomReplica(shape, PROMPT_TOKENS)
    cases = []
    for share, reuse_bytes in ((0.0, 0), *((share, arguments.reuse_bytes) for share in SHARES)):
        print(f"{share:.0%} returning, reuse {'on' if reuse_bytes else 'off'}", flush=True)
        case = find_highest_rate(replica, share, reuse_bytes, arguments.limit_ms, arguments.seconds, arguments.trials)
        cases.append(case)
        print(f"{case['items_per_second']:.0f} items/s within {arguments.limit_ms:g} ms", flush=True)
    return {"published": {"limit_ms": arguments.limit_ms, "seconds": arguments.seconds, "cases": cases,
                          **_describe(replica, shape, arguments)}}  # fmt: skip


def _describe(replica: RandomReplica, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "backbone": f"{shape}, random weights",
        "candidates": CANDIDATES,
        "prompt_tokens": replica.prompt_tokens,
        "context_tokens": replica.context_tokens,
        "reuse_bytes": arguments.reuse_bytes,
        "threads": torch.get_num_threads(),
        **describe_run(*TUNING_PACKAGES),
    }


def main() -> None:
    """Measure one part and write it beside the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="find the highest rate of the published setting")
    parser.add_argument("--shape", choices=SHAPES, help="of the backbone; by default smollm2-135m, or qwen3-0.6b")
    parser.add_argument("--requests", type=int, default=40, help="for each share of returning users")
    parser.add_argument("--limit-ms", type=float, default=500, help="within which 99 %% of requests are answered")
    parser.add_argument("--seconds", type=float, default=10, help="of a trial of a rate")
    parser.add_argument("--trials", type=int, default=7, help="rates that are tried")
    parser.add_argument(
        "--reuse-bytes", type=int, help="default: 1 GiB as the service, 32 GiB with --published on GPUs"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.reuse_bytes is None:
        on_gpu = arguments.published and torch.cuda.is_available()
        arguments.reuse_bytes = 32 << 30 if on_gpu else ServiceOptions().reuse_bytes
    path = arguments.output / f"serving_reuse_{name_device()}.json"
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    parts |= run_published(arguments) if arguments.published else run_returning(arguments)
    record = {"question": __doc__.splitlines()[0], "parts": parts, **describe_run(*TUNING_PACKAGES)}
    write_json(path, record)


if __name__ == "__main__":
    main()
