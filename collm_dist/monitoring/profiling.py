"""Profiler trace of a range of steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collm_dist.runs.atomic_files import explain_disk_errors

logger = logging.getLogger(__name__)

_TABLE_ROWS = 30


class StepProfiler:
    """``torch.profiler`` over a range of optimizer steps. Results do not change.

    The trace includes the time between the steps, such as waiting for data and validations.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, *, start_step: int, total_steps: int) -> None:
        """Select the steps.

        Args:
            folder: output folder.
            steps: first and last step, counted from 1; None = no trace, as on all ranks but the first.
            start_step: steps done before.
            total_steps: most steps.
        """
        self._folder, self._steps = folder, steps
        self._profile: Any = None
        self._last_step = 0
        if steps is not None and not start_step < steps[0] <= total_steps:
            logger.warning(
                "monitoring.profile_steps: step %d of %s will not run (%d of %d are done); no trace is written",
                steps[0], folder.parent.name, start_step, total_steps,
            )  # fmt: skip

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Wrap a step. The trace starts before the first step of the range and is written after the last."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        import torch

        if step == self._steps[0]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        if self._profile is None:  # resumed in the middle of the range
            yield
            return
        self._last_step = step
        with torch.profiler.record_function(f"step {step}"):
            yield
        if step == self._steps[1]:
            self.stop()

    def stop(self) -> None:
        """Stop a running trace; write it for Perfetto, and as a table of the top operators."""
        if self._profile is None:
            return
        import torch

        assert self._steps is not None
        profile, self._profile = self._profile, None
        profile.stop()
        name = f"steps-{self._steps[0]}-{self._last_step}"
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        with explain_disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._folder / f"{name}.pt.trace.json.gz"))
            table = profile.key_averages().table(sort_by=by, row_limit=_TABLE_ROWS, max_name_column_width=60)
            (self._folder / f"{name}.operators.txt").write_text(table, encoding="utf-8")
        print(f"trace of steps {self._steps[0]} to {self._last_step}: {self._folder}", flush=True)
