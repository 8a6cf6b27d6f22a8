"""How fast are the best items of a user found among millions, by the index and by scoring every item?

    python -m benchmarks.retrieval [--items 1000000 10000000] [--threads 2]

Items and users are drawn like those of a trained matrix factorization: clusters of different density, lengths that
differ, a bias of each item. Both ways answer the same queries in turn, one query at a time; the recall is that of the
200 best items over queries by which the index was not built. Each number of items has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.lib.machine import RESULTS, ROOT, describe_run
from benchmarks.lib.side_process import build_environment
from collm_dist.runs.atomic_files import write_json
from collm_dist.serving.item_index import ItemIndex, Vectors

WIDTH, NUM_CLUSTERS, NUM_FOUND = 64, 2000, 200
NUM_BUILD_QUERIES, NUM_QUERIES = 64, 100
_DRAWN_AT_ONCE = 1 << 18


def draw_vectors(num_items: int, num_queries: int) -> tuple[Vectors, Vectors]:
    """Return (num_items, WIDTH + 1) item vectors with their biases, and (num_queries, WIDTH + 1) queries."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(NUM_CLUSTERS, WIDTH)).astype(np.float32) * 0.6
    weights = random.gamma(1, size=NUM_CLUSTERS)
    items = np.empty((num_items, WIDTH + 1), np.float32)
    for first in range(0, num_items, _DRAWN_AT_ONCE):
        rows = items[first : first + _DRAWN_AT_ONCE]
        clusters = random.choice(NUM_CLUSTERS, len(rows), p=weights / weights.sum())
        rows[:, :-1] = centres[clusters] + random.standard_normal((len(rows), WIDTH), np.float32) * 0.5
        rows[:, :-1] *= random.gamma(4, 0.25, size=(len(rows), 1))
        rows[:, -1] = random.normal(size=len(rows)) * 1.5
    queries = centres[random.integers(NUM_CLUSTERS, size=num_queries)] / 2
    queries = queries + random.standard_normal(queries.shape, np.float32) * 0.3
    return items, np.concatenate([queries, np.ones((num_queries, 1), np.float32)], axis=1)


def measure(num_items: int) -> dict[str, Any]:
    """Return times, memory and recall for a number of items."""
    items, queries = draw_vectors(num_items, NUM_BUILD_QUERIES + NUM_QUERIES)
    built_by, asked = queries[:NUM_BUILD_QUERIES], queries[NUM_BUILD_QUERIES:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    index = ItemIndex(items, built_by, exact_below=1)
    build_seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exact = ItemIndex(items, built_by, exact_below=num_items + 1)
    milliseconds: dict[str, list[float]] = {"index": [], "exact": []}
    shared = []
    for query in asked:
        found = {}
        for name, side in (("index", index), ("exact", exact)):
            started = time.perf_counter()
            found[name] = side.search(query, NUM_FOUND)
            milliseconds[name].append(1000 * (time.perf_counter() - started))
        shared.append(len(set(found["index"].tolist()) & set(found["exact"].tolist())))
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    return {
        "items": num_items,
        "build_seconds": build_seconds,
        "vectors_gib": items.nbytes / 2**30,
        "build_peak_above_vectors_gib": (after - before) / 2**20,
        "recall_at_200": sum(shared) / NUM_FOUND / len(asked),
        "recall_at_200_of_the_build": index.recall,
        "milliseconds": milliseconds,
        "medians": medians,
        "exact_over_index": medians["exact"] / medians["index"],
    }


def main() -> int:
    """Measure every number of items in a process of its own, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.items[0])))
        return 0
    result: dict[str, Any] = {**describe_run("faiss-cpu", "numpy"), "threads": arguments.threads, "sizes": []}
    for num_items in arguments.items:
        command = [sys.executable, "-m", "benchmarks.retrieval", "--side", "--items", str(num_items)]
        environment = build_environment(OMP_NUM_THREADS=str(arguments.threads))
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        size = json.loads(done.stdout)
        result["sizes"].append(size)
        print(
            f"{num_items:,} items: {size['medians']['index']:.1f} ms a query, exact {size['medians']['exact']:.1f} "
            f"ms ({size['exact_over_index']:.1f} times as long), recall {size['recall_at_200']:.3f}, built in "
            f"{size['build_seconds']:.0f} s",
            flush=True,
        )
    write_json(RESULTS / "retrieval_cpu.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
