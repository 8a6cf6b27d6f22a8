"""What benchmarks/throughput.py and memory.py share: the sides on the same rows, in turn, and what the rows cost."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.lib.machine import describe_hardware
from benchmarks.lib.side_process import ROOT, SideProcess, build_environment
from benchmarks.lib.tuning_side import REFERENCE_ROWS, REST
from benchmarks.lib.tuning_workload import PHASES, TRAINING, choose_blocks, prepare_run, spell_rows, write_rows
from collm_dist.config import Config
from collm_dist.data.prompts.template import resolve_answer_ids
from collm_dist.runs.run_dir import RunDir
from collm_dist.tuning.flops import DecoderShape, count_padded, count_shared
from collm_dist.tuning.loaded_stage import LoadedStage
from collm_dist.tuning.stage import get_stage

# After its answer a side tidies up and fetches what comes next, on the cores that the other one is measured on.
SETTLE_S = 0.5
# On a CPU our side goes on with its batch for so long and so often, the first time included, which warms up.
TURN_S, MOST_TIMES = 15.0, 6
PACKAGES = ("torch", "transformers", "peft", "deepspeed")
PEERS = ("hf_trainer", "reference", "reference_last")


@dataclass(frozen=True)
class Comparison:
    """Rows that all sides work through.

    Attributes:
        config: of all sides.
        folder: with the rows and configurations.
        work: by phase, what its rows cost and have.
        count: global batches of each phase.
        rounds: through them.
        on_gpu: sides then change after each round, not after each batch, and leave the memory to each other in between.
        held: sides by name and phase that have been started.
    """

    config: Config
    folder: Path
    work: dict[str, dict[str, Any]]
    count: int
    rounds: int
    on_gpu: bool
    held: dict[tuple[str, str], SideProcess] = field(default_factory=dict)

    def measure_phase(self, phase: str, peers: list[str]) -> dict[str, Any]:
        """Let ours and one peer after the other work through the batches of a phase, in turn.

        Never more than two sides are there at once, since the plain ones fill a small machine's memory.

        Returns:
            ``samples`` by peer and side, what the sides said when they were ready, and the load average at each batch.
        """
        ours = self._begin("ours", phase)
        samples: dict[str, dict[str, list[Any]]] = {}
        ready, loads = {"ours": ours.ready}, []
        for peer in peers:
            process = self._begin(peer, phase)
            ready[peer] = process.ready
            taken: dict[str, list[tuple[int, Any]]] = {"ours": [], peer: []}
            for turn, warming in self._list_turns():
                loads.append(round(os.getloadavg()[0], 2))
                for side, one in (("ours", ours), (peer, process)):
                    time.sleep(SETTLE_S)
                    answers = [(number, one.ask(str(number))) for number in turn]
                    # A step of ours is so short beside a peer's that a moment's noise would count.
                    while side != peer and self._is_short([took["seconds"] for _, took in answers]):
                        answers.append((turn[-1], one.ask(str(turn[-1]))))
                    if self.on_gpu:
                        one.ask(REST)
                    for number, took in answers[warming:]:
                        taken[side].append((number, took))
                        shown = f"{took['seconds']:.3f} s, {took['extra_bytes'] / 2**30:.2f} GiB above the weights"
                        print(f"{phase} {number} {side}: {shown}", flush=True)
            process.close()
            samples[peer] = {side: merge_rounds(found, self.count) for side, found in taken.items()}
        ours.close()
        return {"samples": samples, "ready": ready, "load_average": loads}

    def start(self, phases: list[str], peers: list[str]) -> None:
        """Start all sides. They import their libraries at the same time, and wait."""
        for phase in phases:
            for side in ("ours", *peers):
                self.held[side, phase] = self._start(side, phase)

    def describe(self, threads: int) -> dict[str, Any]:
        """Return what a result says about its making."""
        llm, prompt = self.config.llm, self.config.prompt
        return {
            "config": {
                "backbone": Path(llm.backbone).name,
                "dtype": llm.dtype,
                "compile": llm.compile,
                "threads": threads,
                "batches": self.count,
                "rounds": self.rounds,
                "reference_rows": REFERENCE_ROWS,
                "max_tokens": self.config.stage1.max_tokens_per_micro_batch,
                "global_batch_size": self.config.stage1.global_batch_size,
                "prompts": [prompt.stage1, prompt.stage2],
            },
            "hardware": describe_hardware(),
            "versions": {one: importlib.metadata.version(one) for one in PACKAGES},
        }

    def _list_turns(self) -> list[tuple[list[int], int]]:
        """Return the batches that a side works through before the other does, and how many of them warm up.

        Training goes on without a rest, and whoever has rested for the minute of the other one may be slower at first.
        """
        if self.on_gpu:
            return [([0, *range(self.count)], 1)] * self.rounds
        return [([number, number], 1) for number in range(self.count)] * self.rounds

    def _is_short(self, seconds: list[float]) -> bool:
        return not self.on_gpu and len(seconds) < MOST_TIMES and sum(seconds) < TURN_S

    def _begin(self, side: str, phase: str) -> SideProcess:
        process = self.held.pop((side, phase), None) or self._start(side, phase)
        process.begin()
        return process

    def _start(self, side: str, phase: str) -> SideProcess:
        command = [sys.executable, "-m", "benchmarks.lib.tuning_side", "--side", side, "--phase", phase]
        command += ["--config", str(self.folder / ("cached.yaml" if phase == "stage2_cached" else "config.yaml"))]
        command += ["--rows", str(self.folder / f"{phase}.json"), "--batches", str(self.count)]
        command += ["--order", *(str(number) for turn, _ in self._list_turns() for number in turn)]
        # Batches of ever other sizes leave holes in a GPU's memory otherwise, of which a large peer dies.
        environment = build_environment(PYTORCH_ALLOC_CONF="expandable_segments:True")
        return SideProcess(command, environment, held=True)


def merge_rounds(samples: list[tuple[int, dict[str, float]]], count: int) -> list[dict[str, Any]]:
    """Return each batch's median seconds and largest memory."""
    merged = []
    for number in range(count):
        taken = [one for batch, one in samples if batch == number]
        seconds = [one["seconds"] for one in taken]
        most = max(one["extra_bytes"] for one in taken)
        merged.append({"seconds": statistics.median(seconds), "extra_bytes": most, "all_seconds": seconds})
    return merged


def add_arguments(parser: argparse.ArgumentParser, batches: int, peers: Sequence[str] = PEERS) -> None:
    """Add what comparisons take, and --peers if there are several."""
    parser.add_argument("--data", type=Path, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--run-dir", type=Path, help="a run whose data and CF steps are done, in the place of --data")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ml1m_official.yaml")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    if peers:
        parser.add_argument("--peers", nargs="+", default=list(peers), choices=peers)
    parser.add_argument("--batches", type=int, default=batches, help="global batches of each phase")
    rounds = 4 if torch.cuda.is_available() else 1
    parser.add_argument("--rounds", type=int, default=rounds, help="through them; the median of all counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side, on a CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--suffix", default="", help="added to the names of the results, such as _compiled")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all sides")


@contextmanager
def prepare_comparison(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """Make the data and CF steps if they are not done, and write all phases' rows, in a folder that goes away."""
    if (arguments.data is None) == (arguments.run_dir is None):
        sys.exit("one of --data and --run-dir is needed")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare_run(arguments.config, arguments.data, arguments.run_dir or folder / "run", arguments.overrides)
        cached = config.model_copy(update={"stage2": config.stage2.model_copy(update={"context_cache": "memory"})})
        for file, one in (("config.yaml", config), ("cached.yaml", cached)):
            (folder / file).write_text(yaml.safe_dump(one.model_dump(mode="json")), encoding="utf-8")
        work = {phase: _write_workload(config, folder, phase, arguments.batches) for phase in arguments.phases}
        on_gpu = torch.cuda.is_available()
        comparison = Comparison(config, folder, work, arguments.batches, arguments.rounds, on_gpu)
        if on_gpu:  # its minutes are dear, and its machines have the cores
            comparison.start(arguments.phases, arguments.peers)
        yield comparison


def _write_workload(config: Config, folder: Path, phase: str, count: int) -> dict[str, Any]:
    """Write a phase's rows for the peers, and return what they cost and have."""
    stage = get_stage(config, "stage1" if phase == "stage1" else "stage2")
    loaded = stage.build(RunDir(Path(config.run.dir)), torch.device("cpu"))
    blocks = choose_blocks(config, phase, count)
    with torch.no_grad():
        batches = [spell_rows(loaded, block) for block in blocks]
    answers = resolve_answer_ids(loaded.backbone.tokenizer, config.prompt.yes, config.prompt.no)
    write_rows(folder / f"{phase}.json", batches, answers)
    return describe_workload(loaded, phase, blocks, batches)


def describe_workload(loaded: LoadedStage, phase: str, blocks: list[Any], batches: list[Any]) -> dict[str, Any]:
    """Return rows, contexts, useful tokens and operations of a phase's batches."""
    shape, training = DecoderShape.from_model(loaded.backbone.model), phase in TRAINING
    collator = loaded.collator if training else loaded.scoring_collator
    ours = [
        count_shared(shape, collator.collate(block, block), training=training, cached=phase == "stage2_cached")
        for block in blocks
    ]
    lengths = [[len(row["ids"]) for row in batch] for batch in batches]
    return {
        "rows": sum(map(len, batches)),
        "contexts": sum(block.num_contexts for block in blocks),
        "prompt_tokens": sum(map(sum, lengths)),
        "flops": {"ours": sum(one.flops for one in ours)},
        "lengths": lengths,
        "shape": shape,
    }


def count_peer(work: dict[str, Any], peer: str, phase: str, rows: int) -> int:
    """Return the operations of a peer's padded rows."""
    total = 0
    for lengths in work["lengths"]:
        ordered = sorted(lengths) if peer == "hf_trainer" else lengths
        for first in range(0, len(ordered), rows):
            part = ordered[first : first + rows]
            width = max(part) + (peer == "hf_trainer")  # the answer is a label there
            full = peer != "reference_last"
            total += count_padded(work["shape"], len(part), width, training=phase in TRAINING, full_head=full).flops
    return total
