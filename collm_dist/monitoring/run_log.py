"""Log of a step that trains: metrics.jsonl, TensorBoard, Prometheus and a progress bar."""

from __future__ import annotations

import itertools
import json
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from collm_dist.monitoring.prometheus import TrainingTextfile
from collm_dist.monitoring.tags import build_layout, name_scalar
from collm_dist.runs.atomic_files import open_atomic

_TEXT_WIDTH = 100


class RunLogger:
    """Logger of one step. Only rank 0 writes."""

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        tensorboard: bool,
        progress_bar: bool,
        start_step: int,
        total_steps: int,
        textfile: TrainingTextfile | None = None,
    ) -> None:
        """Open the files.

        Args:
            folder: the step's folder.
            is_main: whether this is rank 0.
            tensorboard, progress_bar: whether to write events, and to show a bar.
            start_step: logged points after this step, left by an interrupted run, are removed.
            total_steps: most steps.
            textfile: Prometheus file that gets each point too.
        """
        self._textfile = textfile
        self._writer: Any = None
        self._logged: set[tuple[Any, ...]] = set()
        self._file: Any = None
        self._noted_at = 0.0
        self._bar: Any = tqdm(
            total=total_steps, initial=start_step, desc=folder.name, disable=not (is_main and progress_bar), unit="step"
        )
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        lines = [line for line in read_metrics(path) if line["step"] <= start_step]
        if path.is_dir():  # a log must not stop training; whatever this is, it stays
            path.rename(_find_free_name(path))
        with open_atomic(path) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        # A run that resumed here before and was killed again may have logged points of this step.
        self._logged = {(line["step"], *list(line)[1:]) for line in lines if line["step"] == start_step}
        if textfile is not None:  # else gauges that the next point lacks would be missing until their own next point
            textfile.restore(lines)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
            self._writer.add_custom_scalars(build_layout())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values by tag; values of a step that are logged already are skipped."""
        if self._file is None or (step, *values) in self._logged:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._textfile is not None:
            self._textfile.update(step, values)
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(name_scalar(tag), value, step)

    def log_text(self, tag: str, text: str) -> None:
        """Log a preformatted text; TensorBoard does not wrap its lines."""
        if self._writer is not None:
            lines = [textwrap.fill(line, _TEXT_WIDTH, replace_whitespace=False) for line in text.split("\n")]
            self._writer.add_text(tag, "\n".join(["```", *lines, "```"]), 0)

    def advance(self, step: int, postfix: Mapping[str, str]) -> None:
        """Move the progress bar."""
        self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        """Show what happens between two steps beside the progress bar, at most once a second."""
        if time.monotonic() - self._noted_at >= 1:
            self._noted_at = time.monotonic()
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Close the files; safe to call twice."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _find_free_name(path: Path) -> Path:
    """Return the first of ``NAME.damaged``, ``NAME.damaged-1``, ... that does not exist."""
    suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(1)))
    names = (path.with_name(f"{path.name}.damaged{suffix}") for suffix in suffixes)
    return next(name for name in names if not name.exists() and not name.is_symlink())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the points of a metrics.jsonl, without damaged lines; an unreadable file has none. A log is not state."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return []
    points = []
    for line in text.split("\n"):
        try:
            point = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = point.get("step") if isinstance(point, dict) else None
        if isinstance(step, int) and not isinstance(step, bool):
            points.append(point)
    return points
