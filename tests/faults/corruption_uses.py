"""Uses of a damaged run, publication or export, and their outcomes.

A use returns a description of its result, which must be that of the whole folder, or it raises.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from collm_dist import RankingRequest, load_recommender
from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.errors import CollmError
from collm_dist.evaluation.report import run_evaluation
from collm_dist.orchestration.pipeline import run_pipeline
from collm_dist.runs.atomic_files import compute_file_hash
from collm_dist.runs.local_paths import PathRemover
from collm_dist.runs.publish import INDEX, Publisher
from collm_dist.runs.run_dir import STEPS, RunDir, Step
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences

# Written for people, or to resume a stage that is not done: their loss or damage changes no result.
LOGS = ("checkpoints", "tensorboard", "item_tokens", "metrics.jsonl", "deepspeed_config.json", "status.json",
        "config.yaml", "export.json", "training.png")  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """The whole folders, and what to do with copies of them.

    Attributes:
        folders: run, its publication and its export, by kind.
        requests: to score.
        steps: that are done.
    """

    folders: dict[str, Path]
    requests: Sequence[RankingRequest]
    steps: Sequence[Step] = STEPS

    def load_config(self, copy: Path) -> Config:
        """Return the settings of the whole run, as a user's own file has them, for a copy."""
        return load_config(self.folders["run"] / "config.yaml", [f"run.dir={copy}"])


def make_bench(run: Path, folder: Path, steps: Sequence[Step] = STEPS) -> Bench:
    """Publish and export a finished run."""
    recommender = load_recommender(run, "cpu")
    items, user = recommender.item_ids[:10], recommender.user_ids[0]
    # A known user, a history and a stranger.
    histories: list[tuple[str | None, list[str] | None]] = [(user, None), (None, items[2:5]), ("nobody", items[:2])]
    requests = [RankingRequest(name, history, items) for name, history in histories]
    published, exported = folder / "published", folder / "exported"
    _publish(run, published, steps)
    config = load_config(run / "config.yaml", [f"run.dir={run}"])
    export_model(config, RunDir(run), exported, Licences("none", "none", "none"))
    return Bench({"run": run, "published": published, "exported": exported}, requests, steps)


def describe_tree(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all files of a folder except ``LOGS``, hidden files, and records' versions."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): compute_file_hash(path)
        for name, path in files.items()
        if not set(name.parts) & set(LOGS) and not any(part.startswith(".") for part in name.parts)
    }


def _publish(run: Path, published: Path, steps: Sequence[Step]) -> None:
    with redirect_stdout(StringIO()):
        remover = PathRemover(load_config(run / "config.yaml", [f"run.dir={run}"]), RunDir(run))
        publisher = Publisher(str(published), RunDir(run), False, remover)
        publisher.publish_file("config.yaml")
        for step in steps:
            publisher.publish_step(step)


def load(bench: Bench, copy: Path, _: Path) -> Any:
    """Load the folder and score."""
    recommender = load_recommender(copy, "cpu")
    scores = [*recommender.score(bench.requests), *recommender.score_cf(bench.requests)]
    return np.concatenate(scores).tolist()


def publish(bench: Bench, copy: Path, scratch: Path) -> Any:
    """Publish the run, and load what is published."""
    _publish(copy, scratch / "published", bench.steps)
    # The indices have the hashes of logs too.
    files = {name: value for name, value in describe_tree(scratch / "published").items() if INDEX not in name}
    return [files, load(bench, scratch / "published", scratch)]


def publish_again(bench: Bench, copy: Path, _: Path) -> Any:
    """Publish the whole run where a damaged publication of it is."""
    _publish(bench.folders["run"], copy, bench.steps)
    return describe_tree(copy)


def export(_: Bench, copy: Path, scratch: Path) -> Any:
    """Export the run with its own settings."""
    config = load_config(copy / "config.yaml", [f"run.dir={copy}"])
    return describe_tree(export_model(config, RunDir(copy), scratch / "exported", Licences("none", "none", "none")))


def import_and_load(bench: Bench, copy: Path, scratch: Path) -> Any:
    """Import the export, load that and score."""
    return load(bench, import_model(copy, RunDir(scratch / "imported")).path, scratch)


def evaluate(bench: Bench, copy: Path, _: Path) -> Any:
    """Evaluate the run again."""
    with redirect_stdout(StringIO()):
        report = run_evaluation(bench.load_config(copy), RunDir(copy), force=True)
    files = describe_tree(copy / "eval")
    del files["report.json"]  # it has the hash of the training curves, which show a log
    return [files, report["content_hash"], report["fingerprint"]]


def resume(bench: Bench, copy: Path, scratch: Path) -> Any:
    """Run the whole pipeline again, and load its run."""
    with redirect_stdout(StringIO()) as output:
        code = run_pipeline(bench.load_config(copy))
    if code:
        error = json.loads(output.getvalue().splitlines()[-1])
        raise CollmError.from_dict(error)
    products = {name: value for name, value in describe_tree(copy).items() if not name.endswith("summary.json")}
    return [products, load(bench, copy, scratch)]


# By name: kind of the damaged folder, and the use.
USES: dict[str, tuple[str, Callable[[Bench, Path, Path], Any]]] = {
    "load": ("run", load),
    "publish": ("run", publish),
    "export": ("run", export),
    "evaluate": ("run", evaluate),
    "resume": ("run", resume),
    "load published": ("published", load),
    "publish again": ("published", publish_again),
    "import": ("exported", import_and_load),
}


def use_copy(bench: Bench, use: str, scratch: Path, damage: Callable[[Path], None] = lambda _: None) -> Any:
    """Copy the folder of a use, damage the copy, and use it."""
    kind, function = USES[use]
    shutil.rmtree(scratch, ignore_errors=True)
    copy = shutil.copytree(bench.folders[kind], scratch / "copy", symlinks=True)
    damage(copy)
    return function(bench, copy, scratch)
