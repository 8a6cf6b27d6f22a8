"""Comparison of two sides batch by batch: each in a fresh process, at most two at a time, no trial in either."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.lib.machine import RESULTS, ROOT
from benchmarks.lib.padded_model import REFERENCE_ROWS
from benchmarks.lib.side_process import SideProcess, build_environment
from benchmarks.lib.step_meter import REST
from benchmarks.lib.tuning_workload import PHASES, TRAINING, Sample, prepare_run, sample_batches, spell_rows, write_rows
from collm_dist.config import Config
from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.flops import DecoderShape, count_padded, count_shared
from collm_dist.tuning.loaded_stage import LoadedStage
from collm_dist.tuning.stage import get_stage

# After its answer a side prepares its next batch, on the cores that the other side is measured on.
SETTLE_SECONDS = 0.5
BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True)
class Side:
    """A participant of a comparison.

    Attributes:
        name: in results.
        kind: see ``tuning_side``.
        rows: rows per micro-batch of ``hf_trainer``.
        config: name of its config file, without suffix.
    """

    name: str
    kind: str
    rows: int | None = None
    config: str = "config"


OURS = Side("ours", "ours")


@dataclass(frozen=True)
class Comparison:
    """A prepared comparison.

    Attributes:
        config: of the sides.
        folder: holds the configs and the batches of each phase.
        work: facts of each phase's batches; see ``describe_workload``.
        num_batches: size of each phase's sample.
        rounds: times that each batch is measured.
        on_gpu: sides then take turns after each round instead of each batch, and release memory in between.
    """

    config: Config
    folder: Path
    work: dict[str, dict[str, Any]]
    num_batches: int
    rounds: int
    on_gpu: bool

    def measure_pair(self, phase: str, first: Side, second: Side) -> dict[str, Any]:
        """Measure two sides in turn on the same batches, each in a fresh process.

        Returns:
            ``summarize_pair``'s numbers, each side's ``samples`` by batch and ``ready``, and ``load_average`` by turn.
        """
        processes = {side.name: self._start(side, phase) for side in (first, second)}
        answers: dict[str, list[tuple[int, dict[str, Any]]]] = {name: [] for name in processes}
        loads = []
        for turn, (numbers, warm_ups) in enumerate(self._list_turns()):
            loads.append(round(os.getloadavg()[0], 2))
            names = list(processes)
            for name in names if turn % 2 else reversed(names):
                time.sleep(SETTLE_SECONDS)
                taken = [(number, processes[name].ask(str(number))) for number in numbers]
                if self.on_gpu:
                    processes[name].ask(REST)
                for number, answer in taken[warm_ups:]:
                    answers[name].append((number, answer))
                    memory = f"{answer['extra_bytes'] / 2**30:.2f} GiB above the weights"
                    print(f"{phase} batch {number} {name}: {answer['seconds']:.3f} s, {memory}", flush=True)
        ready = {name: process.ready for name, process in processes.items()}
        for process in processes.values():
            process.close()
        samples = {name: merge_rounds(taken, self.num_batches) for name, taken in answers.items()}
        return summarize_pair(samples) | {"samples": samples, "ready": ready, "load_average": loads}

    def find_fastest_rows(self, phase: str) -> tuple[int, dict[int, float]]:
        """Return the row count with which a batch of ``hf_trainer`` is fastest, and the seconds of all that were tried.

        The trial has a process of its own, so that the memory it takes is not that of the measured process.
        """
        process = self._start(Side("trial", "hf_trainer_trial"), phase)
        process.close()
        seconds = {int(rows): value for rows, value in process.ready["seconds_by_rows"].items()}
        return min(seconds, key=lambda rows: seconds[rows]), seconds

    def describe(self) -> dict[str, Any]:
        """Return the settings that a result depends on."""
        llm, prompt = self.config.llm, self.config.prompt
        return {
            "backbone": Path(llm.backbone).name,
            "dtype": llm.dtype,
            "compile": llm.compile,
            "threads": torch.get_num_threads(),
            "batches": self.num_batches,
            "rounds": self.rounds,
            "max_tokens": self.config.stage1.max_tokens_per_micro_batch,
            "global_batch_size": self.config.stage1.global_batch_size,
            "prompts": [prompt.stage1, prompt.stage2],
        }

    def _list_turns(self) -> list[tuple[list[int], int]]:
        """Return the batches of each turn, and how many of them only warm up."""
        numbers = list(range(self.num_batches))
        if self.on_gpu:
            return [([0, *numbers], 1)] * self.rounds
        return [([0], 1), *[([number], 0) for number in numbers * self.rounds]]

    def _start(self, side: Side, phase: str) -> SideProcess:
        command = [sys.executable, "-m", "benchmarks.lib.tuning_side", "--side", side.kind, "--phase", phase]
        command += ["--config", str(self.folder / f"{side.config}.yaml"), "--rows", str(self.folder / f"{phase}.json")]
        command += ["--rows-per-micro-batch", str(side.rows)] if side.rows else []
        command += ["--batches", str(self.num_batches), "--order"]
        command += [str(number) for numbers, _ in self._list_turns() for number in numbers]
        # Batches of changing sizes fragment a GPU's memory otherwise, and a large peer runs out of it.
        return SideProcess(command, build_environment(PYTORCH_ALLOC_CONF="expandable_segments:True"))


def merge_rounds(answers: Sequence[tuple[int, dict[str, Any]]], num_batches: int) -> list[dict[str, Any]]:
    """Return each batch's median seconds, largest memory and, if known, first loss."""
    merged = []
    for number in range(num_batches):
        taken = [answer for batch, answer in answers if batch == number]
        seconds = [answer["seconds"] for answer in taken]
        sample = {"seconds": statistics.median(seconds), "extra_bytes": max(answer["extra_bytes"] for answer in taken)}
        sample |= {"all_seconds": seconds} if len(seconds) > 1 else {}
        merged.append(sample | ({"loss": taken[0]["loss"]} if "loss" in taken[0] else {}))
    return merged


def summarize_pair(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Compare two sides' samples by batch.

    Args:
        samples: of the first side and of the second.

    Returns:
        ``speedup``: the second side's seconds over the first's, all batches together, with a 95 % bootstrap interval
        over batches and the ratio of each batch. ``peak_extra_gib``: each side's largest memory above the weights.
        ``memory_share``: the first side's peak over the second's.
    """
    first, second = (np.array([sample["seconds"] for sample in taken]) for taken in samples.values())
    drawn = np.random.default_rng(0).integers(len(first), size=(BOOTSTRAP_DRAWS, len(first)))
    low, high = np.quantile(second[drawn].sum(axis=1) / first[drawn].sum(axis=1), (0.025, 0.975))
    peaks = {name: max(sample["extra_bytes"] for sample in taken) / 2**30 for name, taken in samples.items()}
    ours, theirs = peaks.values()
    return {
        "speedup": float(second.sum() / first.sum()),
        "speedup_95": [float(low), float(high)],
        "speedup_by_batch": (second / first).tolist(),
        "seconds": {name: float(taken.sum()) for name, taken in zip(samples, (first, second), strict=True)},
        "peak_extra_gib": peaks,
        "memory_share": ours / theirs if theirs else None,
    }


def add_arguments(parser: argparse.ArgumentParser, phases: Sequence[str] = PHASES) -> None:
    """Add the arguments that all comparisons take."""
    parser.add_argument("--data", type=Path, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--run-dir", type=Path, help="a run whose data and CF steps are done, instead of --data")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--phases", nargs="+", default=["stage1", "stage2"], choices=phases)
    parser.add_argument("--batches", type=int, default=10, help="global batches sampled from the epoch")
    rounds = 4 if torch.cuda.is_available() else 1
    parser.add_argument("--rounds", type=int, default=rounds, help="times each batch is measured; the median counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side, on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--suffix", default="", help="added to the name of the result, such as _compiled")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all sides")


@contextmanager
def prepare_comparison(
    arguments: argparse.Namespace, variants: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[Comparison]:
    """Run the data and CF steps unless they are done, and write configs and batches to a temporary folder.

    Args:
        arguments: those of ``add_arguments``.
        variants: by the name of a config file, values of the config section ``llm`` that differ in it.

    Raises:
        SystemExit: neither or both of --data and --run-dir are given, or no sample has the epoch's mix of contexts.
    """
    if (arguments.data is None) == (arguments.run_dir is None):
        sys.exit("give one of --data and --run-dir")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare_run(arguments.config, arguments.data, arguments.run_dir or folder / "run", arguments.overrides)
        for variant, values in {"config": {}, **(variants or {})}.items():
            changed = config.model_copy(update={"llm": config.llm.model_copy(update=dict(values))})
            text = yaml.safe_dump(changed.to_document())
            (folder / f"{variant}.yaml").write_text(text, encoding="utf-8")
        work = {phase: _write_workload(config, folder, phase, arguments.batches) for phase in arguments.phases}
        yield Comparison(config, folder, work, arguments.batches, arguments.rounds, torch.cuda.is_available())


def _write_workload(config: Config, folder: Path, phase: str, count: int) -> dict[str, Any]:
    """Write a phase's batches for the peers and return their facts."""
    sample = sample_batches(config, phase, count)
    stage = get_stage(config, "stage1" if phase == "stage1" else "stage2")
    loaded = stage.build(RunDir(Path(config.run.dir)), torch.device("cpu"))
    with torch.no_grad():
        batches = [spell_rows(loaded, block) for block in sample.blocks]
    answers = resolve_answer_ids(loaded.backbone.tokenizer, config.prompt.yes, config.prompt.no)
    write_rows(folder / f"{phase}.json", batches, answers)
    return describe_workload(loaded, phase, sample, batches)


def describe_workload(
    loaded: LoadedStage, phase: str, sample: Sample, batches: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return the facts of a phase's batches: rows, contexts, prompt tokens, and operations of our side."""
    shape, training = DecoderShape.from_model(loaded.backbone.model), phase in TRAINING
    collator = loaded.collator if training else loaded.scoring_collator
    costs = [
        count_shared(shape, collator.collate(block, block), training=training, cached=phase == "stage2_cached")
        for block in sample.blocks
    ]
    lengths = [[len(row["ids"]) for row in batch] for batch in batches]
    return {
        "rows": sum(map(len, batches)),
        "contexts_per_batch": {"sample": sample.contexts_per_batch, "epoch": sample.epoch_contexts_per_batch},
        "contexts_by_batch": [block.num_contexts for block in sample.blocks],
        "prompt_tokens": sum(map(sum, lengths)),
        "flops": sum(cost.flops for cost in costs),
        "lengths": lengths,
        "shape": shape,
    }


def count_peer(work: Mapping[str, Any], side: Side, phase: str) -> int:
    """Return the operations of a peer's padded rows."""
    total, is_trainer = 0, side.kind == "hf_trainer"
    rows = side.rows or REFERENCE_ROWS
    for lengths in work["lengths"]:
        ordered = sorted(lengths) if is_trainer else lengths
        for first in range(0, len(ordered), rows):
            part = ordered[first : first + rows]
            width = max(part) + is_trainer  # the answer is a label there
            full = side.kind != "reference_last"
            total += count_padded(work["shape"], len(part), width, training=phase in TRAINING, full_head=full).flops
    return total
