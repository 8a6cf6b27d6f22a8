"""Scoring of a part of a request file: scores as Parquet, then cost and quality as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.metrics import compute_group_ndcg
from collm_dist.runs.atomic_files import open_atomic, write_json
from collm_dist.serving.block_scorer import Scores
from collm_dist.serving.recommender import Recommender
from collm_dist.serving.request_files import name_part, read_part
from collm_dist.serving.requests import RankingRequest

SCORE_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("score", pa.float64()), ("rank", pa.int32())]
)


@dataclass(frozen=True)
class OutputFolder:
    """Paths below the output folder of a scoring job."""

    path: Path

    @property
    def requests(self) -> Path:
        """Folder of the checked requests, removed once all are scored."""
        return self.path / "requests"

    @property
    def plan(self) -> Path:
        """File that names the inputs of the scores; written once the requests are checked."""
        return self.path / "plan.json"

    @property
    def summary(self) -> Path:
        """File whose existence marks the job as done."""
        return self.path / "summary.json"

    def scores(self, part: int) -> Path:
        """File of a part's scores."""
        return self.path / "scores" / f"{name_part(part)}.parquet"

    def record(self, part: int) -> Path:
        """File whose existence marks a part as done."""
        return self.path / "records" / f"{name_part(part)}.json"

    def read_record(self, part: int) -> dict[str, Any] | None:
        """Return a part's record, None if it is not done."""
        try:
            record: dict[str, Any] = json.loads(self.record(part).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) else None


def score_part(recommender: Recommender, folder: OutputFolder, part: int, num_retrieved: int | None) -> dict[str, Any]:
    """Score a part, unless it is done, and return its record.

    Args:
        recommender: recommender of the run.
        folder: output folder of the job, with the checked requests.
        part: number of the part.
        num_retrieved: candidates that the collaborative model retrieves for each user; None = they are given.

    Raises:
        ArtifactError: a score is not finite.
    """
    if (done := folder.read_record(part)) is not None and folder.scores(part).exists():
        return done
    original, labels = read_part(folder.requests, part)
    started = time.perf_counter()
    requests, left_out = original, list[list[str]]()
    if num_retrieved is not None:
        item_lists = recommender.retrieve(original, num_retrieved)
        requests = [replace(request, candidates=items) for request, items in zip(original, item_lists, strict=True)]
    elif recommender.has_windows:
        offered = [recommender.leave_out_unavailable(request) for request in original]
        requests = [request for request, _ in offered]
        left_out = [ids for _, ids in offered if ids]
    retrieved = time.perf_counter()
    filled = [
        index for index, request in enumerate(requests) if len(request.candidates)
    ]  # some users have seen every allowed item, or none of theirs is available
    scored = recommender.score([requests[index] for index in filled])
    record: dict[str, Any] = {
        "users": len(requests),
        "rows": sum(map(len, scored)),
        "device_seconds": time.perf_counter() - started,
        "retrieval_seconds": retrieved - started,
        "users_without_candidates": len(requests) - len(filled),
        **_count_unknown(recommender, original),
    }
    if recommender.has_windows:
        record |= {
            "unavailable_candidates": sum(map(len, left_out)),
            "users_with_unavailable_candidates": len(left_out),
        }
    scores = dict(zip(filled, scored, strict=True))
    labelled = [index for index in range(len(requests)) if any(labels[index] or ())]
    if labelled and recommender.has_cf:
        truths = [_list_truths(original[index], requests[index], labels[index] or []) for index in labelled]
        record |= {"judged_users": len(truths), "recall": float(sum(recall for _, recall in truths))}
        if judged := [(index, truth) for index, (truth, _) in zip(labelled, truths, strict=True) if index in scores]:
            by_cf = recommender.score_cf([requests[index] for index, _ in judged])
            ours, cutoffs = [scores[index] for index, _ in judged], recommender.config.evaluation.cutoffs
            record |= _compare([truth for _, truth in judged], ours, by_cf, cutoffs)
    _write_scores(folder.scores(part), recommender, requests, scores)
    write_json(folder.record(part), record)
    return record


def _count_unknown(recommender: Recommender, requests: Sequence[RankingRequest]) -> dict[str, Any]:
    """Return how many users, and ids of given histories, the run does not know."""
    found = [recommender.find_unknown(request) for request in requests]
    skipped = [sum(map(len, unknown.items.values())) for unknown in found]
    return {
        "unknown_users": sum(unknown.user is not None for unknown in found),
        "unknown_history_ids": sum(skipped),
        "users_with_unknown_history_ids": sum(count > 0 for count in skipped),
    }


def _write_scores(
    path: Path, recommender: Recommender, requests: Sequence[RankingRequest], scores: Mapping[int, Scores]
) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in SCORE_SCHEMA.names}
    for index, logits in scores.items():
        ranked = recommender.order_items(requests[index].candidates, logits)
        columns["user_id"] += [requests[index].user] * len(ranked)
        columns["item_id"] += [item.item_id for item in ranked]
        columns["score"] += [item.score for item in ranked]
        columns["rank"] += [item.rank for item in ranked]
    with open_atomic(path, "wb") as file:
        pq.write_table(pa.table(columns, schema=SCORE_SCHEMA), file)


def _list_truths(original: RankingRequest, request: RankingRequest, labels: Sequence[int]) -> tuple[list[int], float]:
    """Return the labels of a request's candidates, and the share of the liked items that they include (recall)."""
    liked = {item for item, label in zip(original.candidates, labels, strict=True) if label}
    truths = [int(item in liked) for item in request.candidates]
    return truths, sum(truths) / len(liked)


def _compare(
    truths: Sequence[list[int]], ours: Sequence[Scores], by_cf: Sequence[Scores], cutoffs: Sequence[int]
) -> dict[str, Any]:
    """Return sums over the users with a known like, from which means and their standard errors follow.

    A list without a liked item has no correct order: it counts in the recall only.
    """
    groups = np.repeat(np.arange(len(truths)), [len(labels) for labels in truths])
    flat = np.concatenate(truths)
    sums: dict[str, Any] = {}
    for k in cutoffs:
        llm, cf = (compute_group_ndcg(flat, np.concatenate(scores), groups, k).values for scores in (ours, by_cf))
        gain = llm - cf
        sums[f"ndcg@{k}"] = {
            "users": len(gain), "llm": float(llm.sum()), "cf": float(cf.sum()), "gain_squares": float(gain @ gain)
        }  # fmt: skip
    return sums
