"""How much faster does a recommender rank a hundred candidates than row-by-row scoring?

    python -m benchmarks.ranking --data DIR [--cases tiny smollm2] [--threads N] [--output FOLDER]

DIR holds interactions.parquet and items.parquet as configs/ml1m_official.yaml expects them. Ours is
``Recommender.score`` from the request to the scores. The peer gets finished token ids and vectors: padded rows, 16 at a
time, through the same backbone and mapping, with logits at all positions (the authors' way and the default of HF
models) or at the last position. Both score the same users in turn, some at a time; the ratio is of total seconds. The
result includes the largest difference between the two scores of a row. Writes ranking_<device>.json; cases that are not
run keep their earlier entries.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.machine import RESULTS, ROOT, TUNING_PACKAGES, describe_run, name_device
from benchmarks.lib.padded_model import REFERENCE_ROWS, pad
from benchmarks.lib.random_backbone import write_random_backbone
from benchmarks.lib.tuning_workload import prepare_run, spell_rows
from collm_dist.config import Config
from collm_dist.config.loader import dump_config
from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_item_table, load_user_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.llm.backbone import load_backbone
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.finished_run import load_recommender
from collm_dist.serving.requests import RankingRequest
from collm_dist.tuning.loaded_stage import LoadedStage
from collm_dist.tuning.run_stage import run_stage
from collm_dist.tuning.stage import load_stage_model

NUM_CANDIDATES = 100
# Two steps change the mapping from its initial weights. The paper's prompt has two slots that need no statistics, which
# the random candidates of ``draw_requests`` lack.
SETTINGS = [
    "prompt.stage2=configs/prompts/stage2.txt",
    "stage2.max_steps=2",
    "stage2.eval_every_steps=2",
    "stage2.max_valid_contexts=4",
    "stage2.warmup_steps=1",
]
FULL, LAST = "logits everywhere", "logits at the last position"


@dataclass(frozen=True)
class Case:
    """A backbone with its load.

    Attributes:
        backbone: None = random weights of the shape ``tiny``.
        users: number of users.
        step: users at a time.
        peers: kinds of row-by-row scoring.
    """

    backbone: str | None
    users: int
    step: int
    peers: tuple[str, ...]


# With a tiny backbone, logits at all positions would be nearly all of the peer's work; they are left out in its favor.
CASES = {
    "tiny": Case(None, 1000, 100, (LAST,)),
    "smollm2": Case("smollm2-135m-instruct-q4_1", 20, 1, (FULL, LAST)),
}


class PlainScorer:
    """Row-by-row scoring: a padded row for each candidate."""

    def __init__(self, config: Config, loaded: LoadedStage, device: torch.device) -> None:
        llm = config.llm
        self.model = load_backbone(llm.backbone, dtype=llm.dtype, attention=llm.attention).model.to(device).eval()
        self.mapper: Any = loaded.model.slot_mapper
        self.answers = resolve_answer_ids(loaded.backbone.tokenizer, config.prompt.yes, config.prompt.no)
        self.device = device

    @torch.inference_mode()
    def score(self, rows: list[dict[str, Any]], peer: str) -> Tensor:
        """Return the (N,) scores of rows from ``spell_rows``."""
        return torch.cat([self._score_batch(rows[first : first + REFERENCE_ROWS], peer)
                          for first in range(0, len(rows), REFERENCE_ROWS)])  # fmt: skip

    def _score_batch(self, rows: list[dict[str, Any]], peer: str) -> Tensor:
        batch = pad(rows, left=True, answers=None, device=self.device)
        embeds = self.model.get_input_embeddings()(batch["input_ids"])
        for kind, (row, column, vectors) in batch["slots"].items():
            tokens = (self.mapper.pair if kind == "pair" else self.mapper.cf)(vectors)[:, 0]
            embeds = embeds.index_put((row, column), tokens.to(embeds.dtype))
        options = {"logits_to_keep": 1} if peer == LAST else {}
        mask = batch["attention_mask"]
        logits = self.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **options).logits[:, -1]
        yes, no = self.answers
        return (logits[:, yes] - logits[:, no]).double().cpu()


def build_run(case: Case, data: Path, folder: Path, overrides: list[str]) -> Config:
    """Train stage 2 for a few steps, without stage 1, so that the backbone is the published one."""
    backbone = case.backbone
    if backbone is None:
        backbone = str(folder / "backbone")
        write_random_backbone(Path(backbone), "tiny", CASES["smollm2"].backbone or "", torch.float32)
    settings = [f"llm.backbone={backbone}", *SETTINGS, *overrides]
    config = prepare_run(ROOT / "configs" / "ml1m_official.yaml", data, folder / "run", settings)
    (folder / "run" / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    run_stage(config, RunDir(folder / "run"), "stage2")
    return config


def draw_requests(config: Config, users: int) -> tuple[list[RankingRequest], list[ContextBlock]]:
    """Return validation contexts, each with a hundred random items, as requests and as blocks."""
    data_dir = RunDir(Path(config.run.dir)).step_dir("data")
    user_ids, item_ids = load_user_ids(data_dir), load_item_table(data_dir)["item_id"]
    order = GlobalOrder(data_dir, load_manifest(data_dir), "valid", config.run.seed, 1024, shuffle=False)
    requests: list[RankingRequest] = []
    blocks: list[ContextBlock] = []
    random = np.random.default_rng(0)
    for block in order.iter_batches():
        for target in block.target_offsets[:-1].tolist():
            if len(requests) == users:
                return requests, blocks
            context = block.take_targets(np.full(NUM_CANDIDATES, target))
            items = random.choice(len(item_ids), NUM_CANDIDATES, replace=False)
            blocks.append(ContextBlock(**{**vars(context), "item_idx": items, "row_id": np.arange(NUM_CANDIDATES)}))
            history, user = [item_ids[item] for item in context.history_items], user_ids[context.user_idx[0]]
            as_of, candidates = int(context.timestamp[0]), [item_ids[item] for item in items]
            requests.append(RankingRequest(user, history, candidates, as_of))
    raise SystemExit(f"the validation split has {len(requests)} contexts, fewer than --users {users}")


def measure(case: Case, config: Config, users: int) -> dict[str, Any]:
    """Let both sides score the same users in turn, some at a time."""
    run_dir = RunDir(Path(config.run.dir))
    recommender = load_recommender(run_dir.path)
    loaded = load_stage_model(config, run_dir, "stage2", recommender.device)
    plain = PlainScorer(config, loaded, recommender.device)
    requests, blocks = draw_requests(config, users)
    samples: dict[str, list[float]] = {side: [] for side in ("ours", *case.peers)}
    worst, largest = 0.0, 0.0
    for first in range(-case.step, len(requests), case.step):  # the first part is scored twice, to warm up
        part = slice(max(first, 0), max(first, 0) + case.step)
        with torch.no_grad():
            rows = [row for block in blocks[part] for row in spell_rows(loaded, block)]
        ours, seconds = _time(lambda part=part: np.concatenate(recommender.score(requests[part])))
        took = {"ours": seconds}
        for peer in case.peers:
            theirs, took[peer] = _time(lambda rows=rows, peer=peer: plain.score(rows, peer).numpy())
            worst = max(worst, float(np.abs(ours - theirs).max()))
        if first >= 0:
            largest = max(largest, float(np.abs(ours).max()))
            for side, value in took.items():
                samples[side].append(value)
            print({side: round(value, 3) for side, value in took.items()}, flush=True)
    seconds_of = {side: sum(values) for side, values in samples.items()}
    return {
        "users": users,
        "candidates": NUM_CANDIDATES,
        "seconds": seconds_of,
        "ratio": {peer: seconds_of[peer] / seconds_of["ours"] for peer in case.peers},
        "ratio_by_part": {peer: [theirs / ours for theirs, ours in zip(samples[peer], samples["ours"], strict=True)]
                          for peer in case.peers},
        "users_per_second": {side: users / seconds for side, seconds in seconds_of.items()},
        "largest_difference": worst,
        "largest_score": largest,
        "samples": samples,
    }  # fmt: skip


def _time(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()  # scores are on the host when it returns
    return result, time.perf_counter() - started


def main() -> None:
    """Measure case after case; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--users", type=int, help="users of each case, instead of 1,000 and 20")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings for both sides")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.output / f"ranking_{name_device()}.json"
    cases: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    for name in arguments.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            config = build_run(case, arguments.data, Path(folder), arguments.overrides)
            cases[name] = measure(case, config, arguments.users or case.users)
        cases[name]["backbone"] = case.backbone or "random, 2 layers of width 64"
        record = {
            "question": __doc__.splitlines()[0],
            "ratio": {case_name: values["ratio"] for case_name, values in cases.items()},
            "cases": cases,
            "config": {"threads": arguments.threads, "plain_rows": REFERENCE_ROWS, "dtype": config.llm.dtype},
            **describe_run(*TUNING_PACKAGES),
        }
        write_json(path, record)
        shown = f"{cases[name]['ratio']}, largest difference {cases[name]['largest_difference']:.1e}"
        print(f"{name}: {shown}", flush=True)


if __name__ == "__main__":
    main()
