"""The run that a service serves, and its replacement by the run that a link leads to, without a pause."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import torch

from collm_dist.errors import ArtifactError, CheckpointError, CollmError, ConfigError, DataError
from collm_dist.runs.atomic_files import write_json
from collm_dist.runs.damage import read_json_file
from collm_dist.runs.run_dir import RunDir, Step
from collm_dist.serving.exploration import Compared, ModelComparison
from collm_dist.serving.finished_run import find_stage
from collm_dist.serving.http_app import ModelAnswer, Ranked
from collm_dist.serving.http_schemas import HealthAnswer, RefusedRun
from collm_dist.serving.item_search import ItemSearch
from collm_dist.serving.ranking_comparison import compare_each
from collm_dist.serving.recommender import Recommender
from collm_dist.serving.requests import RankingQuery, RankingRequest

logger = logging.getLogger(__name__)

_STEPS: tuple[Step, ...] = ("data", "cf", "stage1", "stage2")
_PROBED = 8
# Errors that come from a run's files and settings, so they stay until these change.
_LASTING = (ArtifactError, CheckpointError, ConfigError, DataError)
# Seconds until a run is tried again that another error has kept out, such as a lack of memory.
_RETRY_S = 300.0
# Of absolute paths.
_FOLDERS = re.compile(r"(?<![\w.~-])/(?:[^\s/'\"]+/)*")


@dataclass(frozen=True)
class ServedRun:
    """A loaded run.

    Attributes:
        recommender: the run's recommender.
        run_dir: its directory.
        model: see ``read_model_id``.
        state: see ``describe_files``; None if the run is not compared with what is on the disk.
        since: time from which it serves, in UTC.
    """

    recommender: Recommender
    run_dir: RunDir
    model: str
    state: str | None
    since: str

    def rank_many(self, queries: Sequence[RankingQuery]) -> list[Ranked]:
        """Answer queries; see ``Recommender.rank_many``."""
        answers = self.recommender.rank_many(queries)
        return [answer if isinstance(answer, Exception) else ModelAnswer(answer, self.model) for answer in answers]

    def compare_many(self, queries: Sequence[RankingQuery]) -> list[Compared]:
        """Answer queries one after the other; see ``Recommender.compare``."""
        answers = compare_each(self.recommender.compare, queries)
        return [answer if isinstance(answer, Exception) else ModelComparison(answer, self.model) for answer in answers]

    @cached_property
    def search(self) -> ItemSearch:
        """Index of the titles."""
        return self.recommender.build_search()

    def describe(self) -> HealthAnswer:
        """Return the answer of ``/healthz``."""
        return HealthAnswer(
            ready=True,
            run=self.run_dir.path.name,
            stage=self.recommender.stage,
            model=self.model,
            device=str(self.recommender.device),
            users=len(self.recommender.user_ids),
            items=len(self.recommender.item_ids),
            since=self.since,
        )


def read_model_id(run_dir: RunDir) -> str:
    """Return the first 12 digits of the scoring stage's content hash."""
    return run_dir.read_content_hash(find_stage(run_dir))[:12]


def load_served_run(run_dir: RunDir, load: Callable[[RunDir], Recommender], state: str | None = None) -> ServedRun:
    """Load a run, whose files are checked against their hashes, and rank with it once.

    Args:
        run_dir: the run.
        load: returns its recommender.
        state: see ``describe_files``.

    Raises:
        ArtifactError: a file is damaged, or a score is not finite.
    """
    recommender = load(run_dir)
    items = recommender.item_ids
    (scores,) = recommender.score([RankingRequest(history=items[:2], candidates=items[:_PROBED])])
    if recommender.has_cf:  # these may be few, or none if no item is available now
        user = recommender.user_ids[0] if recommender.user_ids else None  # None after an export without users
        recommender.rank(user=user, num_retrieved=_PROBED)
    if len(scores) < min(_PROBED, len(items)):
        raise ArtifactError(f"{run_dir.path}: {len(scores)} items were scored, expected at least {_PROBED}")
    served = ServedRun(recommender, run_dir, read_model_id(run_dir), state, _now())
    _ = served.search  # built before the first search
    return served


def describe_files(run_dir: RunDir) -> str:
    """Return a hash of names, sizes and times of the files of a run's steps, which changes if any of them changes."""
    entries = []
    for step in _STEPS:
        for folder, folders, names in os.walk(run_dir.step_dir(step), followlinks=True):
            if "shards" in folders:  # only training reads them
                folders.remove("shards")
            for name in names:
                status = Path(folder, name).stat()
                entries.append([folder, name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


@dataclass(frozen=True)
class _Refusal:
    """A run that is not served.

    Attributes:
        target: the run.
        state: see ``describe_files``.
        answer: the refusal in the answer of ``/healthz``.
        retry_at: monotonic time after which the same files are tried again.
    """

    target: Path
    state: str
    answer: RefusedRun
    retry_at: float

    def holds(self, target: Path, state: str) -> bool:
        """Return whether the refusal still holds for these files."""
        return (self.target, self.state) == (target, state) and time.monotonic() < self.retry_at


class RunFollower:
    """The served run. Given a link, it loads the run that the link leads to beside the served one, then changes over.

    A run that cannot be loaded, or does not rank, is refused, and the served run stays. If its files are the reason, it
    is refused until they change; anything else, such as too little memory, may pass, so it is tried again after
    ``_RETRY_S`` seconds. While a run is loaded, both are in memory.
    """

    def __init__(
        self,
        run_dir: RunDir,
        load: Callable[[RunDir], Recommender],
        pointer: Path | None,
        every_s: float,
        report: Callable[[HealthAnswer], None] = lambda health: None,
    ) -> None:
        """Load the run.

        Args:
            run_dir: the run. With a pointer, the run that it leads to is tried first, then the one that took over
                last.
            load: loads the recommender of a run.
            pointer: link to runs; None = the run stays.
            every_s: seconds between looks at the link.
            report: called with the answer of ``/healthz`` at the start and after each look.

        Raises:
            CollmError: the run cannot be loaded.
        """
        self._load, self._pointer, self._every_s = load, pointer, every_s
        self._refused: _Refusal | None = None
        self._served: ServedRun | None = None
        self._stop = threading.Event()
        if pointer is not None:
            self.look()
            if self._served is None:
                self._served = self._load_last()
        if self._served is None:
            self._served = load_served_run(run_dir, load)
        self._report = report
        report(self.describe())
        if pointer is not None:
            threading.Thread(target=self._follow, daemon=True).start()

    @property
    def served(self) -> ServedRun:
        """The served run. Hold it for the duration of a pass: it may be replaced at any time."""
        assert self._served is not None
        return self._served

    def describe(self) -> HealthAnswer:
        """Return the answer of ``/healthz``."""
        refused = self._refused
        pointer = None if self._pointer is None else self._pointer.name
        return self.served.describe().model_copy(
            update={"follows": pointer, "refused": None if refused is None else refused.answer}
        )

    @property
    def _note(self) -> Path:
        """File beside the link that names the run that took over last. A restarted process falls back to that run."""
        assert self._pointer is not None
        return self._pointer.with_name(f".{self._pointer.name}.served.json")

    def _load_last(self) -> ServedRun | None:
        """Return the run that took over last, or None; the link leads to one that is refused."""
        try:
            last = Path(read_json_file(self._note, "run", remedy="delete it")["run"])
            return load_served_run(RunDir(last), self._load, describe_files(RunDir(last)))
        except Exception as error:  # none took over, or it has been removed
            logger.warning("the run before is not served: %s", error)
            return None

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def _follow(self) -> None:
        while not self._stop.wait(self._every_s):
            self.look()
            self._report(self.describe())

    def look(self) -> None:
        """Change over to the run that the link leads to, if it is another one and can be served."""
        assert self._pointer is not None
        target, state = self._pointer, ""
        try:
            target = self._pointer.resolve(strict=True)
            run_dir, state = RunDir(target), describe_files(RunDir(target))
            if self._served is not None and (self._served.run_dir.path, self._served.state) == (target, state):
                self._refused = None
                return
            if self._refused is not None and self._refused.holds(target, state):
                return
            served = load_served_run(run_dir, self._load, state)
            if describe_files(run_dir) != state:
                raise ArtifactError(f"{target}: its files changed while they were read; it is tried again")
        except Exception as error:  # whatever is wrong with the new run, the old one serves
            if self._refused is not None and self._refused.holds(target, state):
                return
            name = error.name if isinstance(error, CollmError) else type(error).__name__
            logger.error("%s is not served: %s: %s", target, name, error)
            reason = f"{name}; the service's log has the message"
            if isinstance(error, ArtifactError):  # which file is damaged; anyone may read this, so no settings or paths
                reason = _FOLDERS.sub("", str(error).partition("\n")[0].replace(f"{target.parent}/", ""))
            wait = math.inf if isinstance(error, _LASTING) else _RETRY_S
            answer = RefusedRun(run=target.name, reason=reason, since=_now())
            self._refused = _Refusal(target, state, answer, time.monotonic() + wait)
        else:
            self._served, self._refused = served, None
            try:
                write_json(self._note, {"run": str(target)})
            except (CollmError, OSError) as error:  # such as a read-only folder; the run serves all the same
                logger.warning("%s is not written: %s", self._note, error)
        gc.collect()  # of the run that serves no longer, or was refused
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
