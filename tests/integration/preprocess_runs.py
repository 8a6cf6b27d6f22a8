"""Helpers of the preprocessing tests: configurations, small logs, lists of samples."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from collm_dist.config import Config
from collm_dist.data.ingest.id_forms import IdIndex
from collm_dist.data.prompts.title_lists import take_context_ratings
from collm_dist.data.samples.splits import SPLITS
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_item_table, load_user_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import DataError
from collm_dist.orchestration.preprocess import run_preprocess
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.event_log import EventLog
from collm_dist.serving.requests import RankingRequest, RequestReader
from tests.reference.plain_samples import Row


def make_config(dataset: dict, folder: Path | str, **sections) -> Config:
    preprocessing = {"num_user_buckets": 3, "num_shards": 2, "contexts_per_record": 16, **sections.pop("pre", {})}
    return Config.model_validate(
        {
            "run": {"dir": str(folder)},
            "dataset": dataset,
            "preprocessing": preprocessing,
            "monitoring": {"progress_bar": False},
            "cluster": {"ray_num_cpus": 2, "object_store_gb": 0.1},
            **sections,
        }
    )


def ratings_of(folder: Path) -> dict:
    return {
        "path": str(folder / "ratings.csv"),
        "items_path": str(folder / "items.csv"),
        "columns": {"rating": "rating"},
    }


def preprocess(config: Config, **options) -> dict:
    return run_preprocess(config, RunDir(Path(config.run.dir)), **options)


def run_command(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run launch/preprocess_data.py with a separate Ray."""
    command = [sys.executable, "launch/preprocess_data.py", "--config", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    return subprocess.run(command, cwd=repository, env=environment, check=True, capture_output=True, text=True)


def list_samples(folder: Path) -> list[tuple]:
    """Return all samples of all shards with raw ids, sorted."""
    data = folder / "data"
    manifest, users, items = load_manifest(data), load_user_ids(data), load_item_table(data)["item_id"]
    samples = []
    for split in SPLITS:
        for block in GlobalOrder(data, manifest, split, 0, 1000, shuffle=False).iter_batches():
            for target, context in enumerate(block.target_contexts):
                history = block.history_items[block.history_offsets[context] : block.history_offsets[context + 1]]
                facts = [
                    int(getattr(block, f"{who}_{what}")[target])
                    for who in ("user", "item")
                    for what in ("likes", "rows")
                ]
                samples.append((split, int(block.row_id[target]), users[block.user_idx[context]],
                                items[block.item_idx[target]], int(block.label[target]), int(block.num_likes[context]),
                                tuple(items[item] for item in history), *facts))  # fmt: skip
    return sorted(samples)


def write_csv(folder: Path, lines: list[str]) -> dict:
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text("user_id,item_id,timestamp,rating\n" + "\n".join(lines) + "\n")
    return {"path": str(folder / "log.csv"), "columns": {"rating": "rating"}}


GOOD = [
    f"{user},{item},{1_000_000_000 + 3600 * (10 * user + item)},{item % 5 + 1}"
    for user in range(6)
    for item in range(9)
]


def die_once(marker: str) -> str:
    """Kill the own process at the first call."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "ok"


def complain(number: int) -> None:
    """Raise an error, the later the smaller the number."""
    time.sleep(1 / number)
    raise DataError(f"read me {number}")


def list_rated(block: ContextBlock, items: list[str]) -> list[tuple[str, int]]:
    """Return (item, 1 = liked) of the last three items in a block of one context."""
    return [(items[value // 2], value % 2) for value in take_context_ratings(block, 3).values.tolist()]


@cache
def read_requests(data: Path) -> RequestReader:
    """Return the reader of requests of a data folder, for six likes and three dislikes."""
    manifest = load_manifest(data)
    users, items = load_user_ids(data), load_item_table(data)["item_id"]
    return RequestReader(
        IdIndex(users), IdIndex(items), EventLog.load(data, manifest),
        max_history_length=6, max_dislikes=3, every_event_is_a_like=False,
    )  # fmt: skip


def ask_rated(data: Path, row: Row, rated: list[tuple[str, int]], items: list[str]) -> list:
    """Return what ``list_rated`` does of two requests: by user and time, and of an unknown user by all ratings."""
    reader = read_requests(data)
    history, labels = ([event[place] for event in rated] for place in (0, 1))
    requests = (
        RankingRequest(row.user, None, [row.item], row.time),
        RankingRequest(None, history, [row.item], history_labels=labels),
    )
    blocks = [reader.build_block([reader.read_user(one)], [reader.read_candidates(one)]) for one in requests]
    return [list_rated(block, items) for block in blocks]
