"""Batch ranking: parts of a request file on a pool of Ray actors, a model per device."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm

from collm_dist.config import Config
from collm_dist.data.shards.availability import WINDOW_COLUMNS
from collm_dist.data.shards.interactions import load_item_table
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError, RequestError
from collm_dist.orchestration.cluster import check_nodes, connect_ray, explain_task_error
from collm_dist.phases import show_phase
from collm_dist.runs.atomic_files import clear_unfinished, compute_file_hash, write_json
from collm_dist.runs.damage import read_json_file
from collm_dist.runs.fingerprints import find_changes
from collm_dist.runs.run_dir import RunDir, Step
from collm_dist.serving.finished_run import build_recommender, check_settings, find_stage
from collm_dist.serving.part_scoring import OutputFolder, score_part
from collm_dist.serving.recommender import Recommender
from collm_dist.serving.request_files import list_request_files, write_parts

# Users scored together, and the work lost when a process dies. Fixed, so that scores do not depend on the number of
# devices.
ROWS_PER_PART = 128
_RETRIEVAL = "cf:"
# Counts of what the run does not know; release 0.1 has not counted it.
_UNKNOWN = ("unknown_users", "unknown_history_ids", "users_with_unknown_history_ids")
# Counts of left-out candidates and of their users, for runs with availability windows.
_LEFT_OUT = ("unavailable_candidates", "users_with_unavailable_candidates")
_EMPTY = "users_without_candidates"
_REMEDY = "set --output to a new folder, or delete this one"
_MEMORY_REMEDY = "lower --num-actors, so that fewer models are loaded, or use nodes with more memory"


def parse_candidates(text: str | None) -> int | None:
    """Return N of ``cf:N``; None if the file lists the candidates.

    Raises:
        RequestError: the text has another form.
    """
    if text is None:
        return None
    number = text.removeprefix(_RETRIEVAL)
    if not text.startswith(_RETRIEVAL) or not number.isdecimal() or int(number) < 1:
        raise RequestError(
            f"--candidates: '{text}' is not of the form cf:200; omit the option to use the file's candidate lists"
        )
    return int(number)


def score_candidates(
    config: Config,
    run_dir: RunDir,
    source: Path,
    output: Path,
    *,
    num_retrieved: int | None = None,
    rows_per_part: int = ROWS_PER_PART,
    num_actors: int | None = None,
    trust_code: bool = False,
    accept_stage1: bool = False,
) -> dict[str, Any]:
    """Score a file of requests and return the summary; resumes an interrupted call.

    Args:
        config: the experiment.
        run_dir: run whose stage 2, or stage 1, scores.
        source: Parquet file or folder, see ``serving.request_files``.
        output: folder; gets ``scores/part-*.parquet`` with user_id, item_id, score, rank, and ``summary.json``.
        num_retrieved: see ``parse_candidates``.
        rows_per_part: users per part.
        num_actors: models to load; None for one per GPU, or one per node without GPUs.
        trust_code, accept_stage1: see ``load_recommender``.

    Raises:
        RequestError: the input is invalid; nothing was scored.
        ArtifactError: the run is unfinished or inconsistent, or the output folder holds other scores.
        LaunchError: Ray does not start, or its processes keep dying.
    """
    for name, number in (("--num-actors", num_actors), ("--rows-per-part", rows_per_part)):
        if number is not None and number < 1:
            raise RequestError(f"{name}: {number} is less than 1; omit the option for the default")
    run_dir = RunDir(run_dir.path.absolute())
    folder = OutputFolder(output.absolute())
    config = check_settings(config, run_dir, trust_code=trust_code, accept_stage1=accept_stage1)
    if num_retrieved is not None and not run_dir.is_done("cf"):
        raise ArtifactError(f"--candidates: the step 'cf' of {run_dir.path} is not done; it retrieves the candidates")
    sizes = _prepare(config, run_dir, source, folder, num_retrieved, rows_per_part)
    if folder.summary.exists():
        print(f"done already ({folder.summary})", flush=True)
    else:
        started = time.perf_counter()
        waiting = [part for part in range(len(sizes)) if folder.read_record(part) is None]
        with clear_unfinished(folder.path), connect_ray(config.cluster):
            actors = _score_on_ray(config, run_dir, folder, sizes, waiting, num_retrieved, num_actors)
        summary = _summarize([folder.read_record(part) or {} for part in range(len(sizes))])
        summary |= {"actors": actors, "seconds": time.perf_counter() - started, "resumed_at": len(sizes) - len(waiting)}
        write_json(folder.summary, summary)
        shutil.rmtree(folder.requests)
    summary = read_json_file(folder.summary, remedy=_REMEDY)
    print("\n".join(describe_summary(summary, folder)), flush=True)
    return dict(summary)


def _prepare(
    config: Config,
    run_dir: RunDir,
    source: Path,
    folder: OutputFolder,
    num_retrieved: int | None,
    rows_per_part: int,
) -> list[int]:
    """Check the input and write its parts, unless an earlier call has; return the number of rows of each part."""
    files = list_request_files(source)
    steps: list[Step] = ["data", find_stage(run_dir)]
    if run_dir.is_done("cf"):
        steps.append("cf")
    made_from: dict[str, Any] = {
        **{f"input.{place}": compute_file_hash(path) for place, path in enumerate(files)},
        **{step: run_dir.read_content_hash(step) for step in steps},
        "candidates": f"{_RETRIEVAL}{num_retrieved}" if num_retrieved else "given",
        "rows_per_part": rows_per_part,
        "cutoffs": list(config.evaluation.cutoffs),
    }
    items = load_item_table(run_dir.step_dir("data"))
    if set(WINDOW_COLUMNS) & set(items):  # windows are not part of the data's hash: no model depends on them
        made_from["items"] = load_manifest(run_dir.step_dir("data")).tables["items.parquet"]
    if folder.plan.exists():
        plan = read_json_file(folder.plan, "made_from", "sizes", remedy=_REMEDY)
        if changes := find_changes(plan["made_from"], made_from):
            raise ArtifactError(
                f"{folder.path} holds scores of other inputs:\n  "
                + "\n  ".join(changes)
                + "\nSet --output to a new folder, or delete this one"
            )
        return list(plan["sizes"])
    shutil.rmtree(folder.requests, ignore_errors=True)
    retrieves = num_retrieved is not None
    with show_phase("checking the requests"):
        sizes = write_parts(
            files,
            folder.requests,
            items["item_id"],
            retrieves=retrieves,
            rows_per_part=rows_per_part,
            events_end=load_manifest(run_dir.step_dir("data")).events_end,
        )
    write_json(folder.plan, {"made_from": made_from, "sizes": sizes, "now": int(time.time())})
    return sizes


def read_now(folder: OutputFolder) -> int | None:
    """Return the time at which a job began, which stands for now until it is done: seconds since 1970.

    Jobs of release 0.1 have no such time: None.
    """
    now = read_json_file(folder.plan, remedy=_REMEDY).get("now")
    return None if now is None else int(now)


class _PartScorer:
    """Actor of the pool: loads the model with its first part, then scores parts."""

    def __init__(self, config: Config, run_dir: RunDir, folder: OutputFolder, num_retrieved: int | None) -> None:
        self._config, self._run_dir, self._folder, self._num_retrieved = config, run_dir, folder, num_retrieved
        self._recommender: Recommender | None = None

    def start(self) -> None:
        """Return once the actor has its resources."""

    def score(self, part: int) -> int:
        """Score a part, and return its number of users."""
        if self._recommender is None:  # here, because the error of a constructor comes without its class
            now = read_now(self._folder)
            self._recommender = build_recommender(self._config, self._run_dir, now=now)
        return int(score_part(self._recommender, self._folder, part, self._num_retrieved)["users"])


def _score_on_ray(
    config: Config,
    run_dir: RunDir,
    folder: OutputFolder,
    sizes: Sequence[int],
    waiting: Sequence[int],
    num_retrieved: int | None,
    num_actors: int | None,
) -> int:
    """Score the unfinished parts with a progress bar over all users; return the number of actors."""
    check_nodes(folder.path, "--output")
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    nodes = sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in ray.nodes())
    actors = min(num_actors or gpus or nodes, max(len(waiting), 1))
    # On CPUs the actors share the cores of the cluster; Ray gives each as many threads as cores.
    cores = 1 if gpus else max(int(resources.get("CPU", 1)) // max(actors, nodes), 1)
    # A relative path to a local backbone may not resolve in a worker's working directory.
    backbone = Path(config.llm.backbone).expanduser()
    if backbone.exists():
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"backbone": str(backbone.absolute())})})
    # Small arguments: those in the object store can be lost before an actor that died is restarted with them.
    actor = ray.remote(num_cpus=cores, num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=3)(_PartScorer)
    done = sum(sizes) - sum(sizes[part] for part in waiting)
    hidden = not config.monitoring.progress_bar
    try:
        users = _score_parts((actor.remote(config, run_dir, folder, num_retrieved) for _ in range(actors)), waiting)
        with show_phase("loading the model and scoring the first users"):
            first = list(islice(users, 1))
        with tqdm(total=sum(sizes), initial=done, desc="scoring", unit=" users", disable=hidden) as bar:
            for number in chain(first, users):
                bar.update(number)
    except ray.exceptions.RayError as error:
        raise explain_task_error(error, "scoring", _MEMORY_REMEDY) from None
    return actors


def _score_parts(scorers: Iterable[Any], parts: Sequence[int]) -> Iterator[int]:
    """Yield the number of users of each scored part.

    Actors that the cluster has no room for get no parts. An actor without a part is let go, so that it ends and leaves
    its resources to an actor that has lost its node.
    """
    running = {scorer.start.remote(): scorer for scorer in scorers}
    waiting, num_open = iter(parts), len(parts)
    while num_open:
        (done,), _ = ray.wait(list(running))
        scorer, users = running.pop(done), ray.get(done)
        if (part := next(waiting, None)) is not None:
            running[scorer.score.remote(part)] = scorer
        del scorer
        if users is not None:
            num_open -= 1
            yield users


def _summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return totals of the parts' records, means over users, and the standard error of the paired gain."""
    names: tuple[str, ...] = ("users", "rows", "device_seconds", "retrieval_seconds", _EMPTY, *_UNKNOWN)
    if any(_LEFT_OUT[0] in record for record in records):
        names += _LEFT_OUT
    total: dict[str, Any] = {name: sum(record.get(name, 0) for record in records) for name in names}
    total["device_seconds_per_1000_users"] = 1000 * total["device_seconds"] / total["users"]
    judged = [record for record in records if "judged_users" in record]
    if not judged:
        return total
    total["judged_users"] = sum(record["judged_users"] for record in judged)
    total["recall"] = sum(record["recall"] for record in judged) / total["judged_users"]
    compared = [record for record in judged if any(name.startswith("ndcg@") for name in record)]
    for name in [name for record in compared[:1] for name in record if name.startswith("ndcg@")]:
        sums = {key: sum(record[name][key] for record in compared) for key in ("users", "llm", "cf", "gain_squares")}
        if users := sums["users"]:
            gain = (sums["llm"] - sums["cf"]) / users
            variance = max(sums["gain_squares"] / users - gain**2, 0.0)
            total[name] = {
                "users": users,
                "llm": sums["llm"] / users,
                "cf": sums["cf"] / users,
                "gain": gain,
                "gain_standard_error": math.sqrt(variance / users),
            }
    return total


def describe_summary(summary: Mapping[str, Any], folder: OutputFolder) -> list[str]:
    """Return the summary as lines of text."""
    lines = [
        f"{summary['users']:,} users, {summary['rows']:,} candidates, {summary['seconds']:,.1f} s with "
        f"{summary['actors']} model(s); {summary['device_seconds_per_1000_users']:,.1f} device-seconds per 1,000 users"
    ]
    if summary.get("unknown_users"):
        lines.append(
            f"WARNING: {summary['unknown_users']:,} users are not in the run's log; their items are ranked by the "
            "given history, or without one as for an unknown user"
        )
    if summary.get("unknown_history_ids"):
        lines.append(
            f"WARNING: {summary['unknown_history_ids']:,} ids in lists of items of "
            f"{summary['users_with_unknown_history_ids']:,} users are not in the run's item table and are skipped"
        )
    if summary.get("unavailable_candidates"):
        lines.append(
            f"WARNING: {summary['unavailable_candidates']:,} candidates of "
            f"{summary['users_with_unavailable_candidates']:,} users were not available at as_of, or when the job "
            "began, and are left out"
        )
    if summary.get(_EMPTY):
        lines.append(f"WARNING: {summary[_EMPTY]:,} users have no candidates, so no rows")
    if "recall" in summary:
        lines.append(
            f"{summary['judged_users']:,} users with known likes, of which the candidates hold {summary['recall']:.1%}"
        )
    for name, metric in summary.items():
        if name.startswith("ndcg@"):
            lines.append(
                f"{name}: {metric['llm']:.4f}, in the order of the collaborative model {metric['cf']:.4f}; gain "
                f"{metric['gain']:+.4f} ± {metric['gain_standard_error']:.4f} "
                f"(standard error, {metric['users']:,} users)"
            )
    return [*lines, f"scores: {folder.path / 'scores'}"]
