"""Our side of benchmarks/cf_throughput.py: train one epoch per line on standard input.

The requests are those of recbole_epoch.py. In addition, ``limit`` measures the machine and answers with the least
seconds that a batch needs (cf_limits.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.cf_limits import compute_limit, count_work, measure_rates
from benchmarks.lib.epoch_timing import TimedBatches, TimedCall, list_operators, read_peak_memory, reset_peak_memory
from collm_dist.cf import trainer
from collm_dist.cf.batches import count_batches, iter_batches
from collm_dist.cf.biases import fit_biases
from collm_dist.cf.fitting import build_plan, build_untrained
from collm_dist.cf.optimizer import Optimizers
from collm_dist.cf.user_shards import load_worker_data, number_globally
from collm_dist.config import CfConfig
from collm_dist.data.shards.manifest import load_manifest

COUNTED_BATCHES = 8


class OurSide:
    """Epochs of one model with our trainer."""

    def __init__(self, data_dir: Path, settings: dict[str, Any], max_batches: int | None) -> None:
        cf = CfConfig(**settings)
        manifest = load_manifest(data_dir)
        data = load_worker_data(data_dir, manifest, splits=("train",))
        self.train = number_globally(data.splits["train"], data.users)
        self.model = build_untrained(cf, manifest, data.users, self.train, seed=0)
        self.model.prepare(self.train)
        fit_biases(self.model, self.train, cf.bias_weight_decay)
        self.plan, self.epoch, self.max_batches = build_plan(cf, seed=0), 0, max_batches
        self.optimizers = Optimizers(self.model, self.plan.learning_rate)

    def train_epoch(self) -> dict[str, Any]:
        """Train one epoch, or the counted batches, and return the seconds, in all and by part."""
        gradients, step = TimedCall(self.model.backpropagate), TimedCall(self.optimizers.step)
        timed: TimedBatches | None = None

        def list_batches(*args: Any) -> Iterator[Any]:
            nonlocal timed
            timed = TimedBatches(iter_batches(*args), self.max_batches, [gradients, step])
            return iter(timed)

        self.model.backpropagate, self.optimizers.step = gradients, step  # type: ignore[method-assign]
        trainer.iter_batches = list_batches
        loss = trainer.train_epoch(self.model, self.optimizers, self.train, self.plan, self.epoch)
        assert timed is not None
        measured = timed.measure()
        trainer.iter_batches = iter_batches
        self.model.backpropagate, self.optimizers.step = gradients.function, step.function  # type: ignore[method-assign]
        self.epoch += 1
        parts = {"gradients": gradients.seconds, "optimizer": step.seconds, "order": timed.loading}
        parts["load_and_rest"] = measured["seconds"] - sum(parts.values())
        return {**measured, "mean_loss": loss, "parts": parts}

    def compute_limit(self) -> dict[str, Any]:
        """Return the work of a batch, the machine's rates, and the least seconds of a batch."""
        some = islice(iter_batches(self.train, self.plan.global_batch_size, 0, self.epoch), COUNTED_BATCHES)
        work = count_work(self.model, self.train, some)
        table = max((self.model.users.weight, self.model.items.weight), key=lambda weight: weight.numel())
        rates = measure_rates(*table.shape)
        return {"work_of_a_batch": work, "rates": rates, "seconds_of_a_batch": compute_limit(work, rates)}


def main() -> None:
    """Answer each line of standard input with a line of JSON; the first line of output means ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data step")
    parser.add_argument("--settings", type=json.loads, required=True, help="settings of the section cf as JSON")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--max-batches", type=int, help="batches of a sample; default: the epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    side = OurSide(arguments.data, arguments.settings, arguments.max_batches)
    ready = {
        "rows": side.train.total_rows,
        "contexts": side.train.total_contexts,
        "batches": count_batches(side.train, side.plan.global_batch_size),
        "parameters": sum(parameter.numel() for parameter in side.model.parameters()),
    }
    reset_peak_memory()
    print(json.dumps(ready), flush=True)
    requests = {
        "epoch": side.train_epoch,
        "profile": lambda: list_operators(side.train_epoch),
        "limit": side.compute_limit,
        "memory": read_peak_memory,
    }
    for line in sys.stdin:
        print(json.dumps(requests[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
