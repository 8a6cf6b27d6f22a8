"""LightFM's side of benchmarks/cf_lightfm.py: train one epoch per line on standard input.

LightFM is compiled code that needs older libraries, so this runs in an environment of its own and imports nothing from
here. The rows are the .npz file of benchmarks/cf_throughput.py: user_idx, item_idx, label (N,), num_users, num_items.

The line ``epoch`` trains an epoch and answers with its seconds, in all and of the processor; ``loss`` answers with the
mean log-loss of the training rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lightfm import LightFM
from scipy.sparse import coo_matrix

PREDICTED_ROWS = 1_000_000  # at most so many rows are scored at a time


class LightFMSide:
    """Epochs of matrix factorization with LightFM's logistic loss.

    A score is user · item + user's bias + item's bias, and a row's loss softplus(-y * score) with y = 1 for a like
    and -1 for a dislike. It is our binary cross-entropy of that score.
    """

    def __init__(self, rows: Any, width: int, threads: int) -> None:
        labels = np.where(rows["label"] > 0, 1, -1).astype(np.int32)
        shape = int(rows["num_users"]), int(rows["num_items"])
        users, items = rows["user_idx"].astype(np.int32), rows["item_idx"].astype(np.int32)
        self.rows, self.threads = coo_matrix((labels, (users, items)), shape=shape), threads
        self.model = LightFM(no_components=width, loss="logistic", random_state=0)

    def train_epoch(self) -> dict[str, float]:
        """Train an epoch and return its seconds."""
        started, started_cpu = time.perf_counter(), time.process_time()
        self.model.fit_partial(self.rows, epochs=1, num_threads=self.threads)
        return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}

    def compute_loss(self) -> float:
        """Return the mean log-loss of the training rows."""
        total = 0.0
        for start in range(0, self.rows.nnz, PREDICTED_ROWS):
            part = slice(start, start + PREDICTED_ROWS)
            scores = self.model.predict(self.rows.row[part], self.rows.col[part], num_threads=self.threads)
            total += float(np.logaddexp(0.0, -self.rows.data[part] * scores).sum())
        return total / int(self.rows.nnz)


def main() -> None:
    """Answer each line of standard input with a line of JSON; the first line of output means ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help=".npz file of the training rows")
    parser.add_argument("--width", type=int, required=True, help="length of a vector")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    side = LightFMSide(np.load(arguments.rows), arguments.width, arguments.threads)
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("lightfm", "numpy", "scipy")}}
    print(json.dumps({"rows": int(side.rows.nnz), "versions": versions}), flush=True)
    requests = {"epoch": side.train_epoch, "loss": side.compute_loss}
    for line in sys.stdin:
        print(json.dumps(requests[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
