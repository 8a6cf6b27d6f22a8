"""What a run shows while it works: TensorBoard, metrics.jsonl, progress, peak memory. Tags are ``group/name_unit``."""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from collm_dist.artifacts import open_atomic
from collm_dist.errors import LaunchError

TRAIN_LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"
SAMPLES_PER_SECOND = "speed/samples_per_second"
TOKENS_PER_SECOND = "speed/tokens_per_second_per_device"
EPOCH_SECONDS = "speed/epoch_seconds"
DATA_WAIT_SHARE = "speed/data_wait_share"
PEAK_MEMORY = "memory/peak_gib"
VALID_AUC = "valid/auc"
VALID_UAUC = "valid/uauc"
VALID_LOGLOSS = "valid/logloss"


def measure_peak_gib(device: torch.device) -> float:
    """Return the peak memory of this process so far, in GiB: of the GPU if it has one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class PeakMeter:
    """A context that measures how far memory rises above where it stood on entry.

    Attributes:
        extra_bytes: known on leaving; of the GPU, else of this process's resident memory (Linux).
    """

    def __init__(self, device: torch.device) -> None:
        """Measure a device."""
        self._device, self._start, self.extra_bytes = device, 0, 0

    def __enter__(self) -> PeakMeter:
        """Start from what is in use now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            if sys.platform != "linux":
                raise LaunchError(
                    "memory can be measured on Linux or a GPU: set max_tokens_per_micro_batch to a number"
                )
            # What the allocator keeps for later would hide the same amount taken again.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self._start = _read_status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        """Read the peak."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.extra_bytes = torch.cuda.max_memory_allocated(self._device) - self._start
        else:
            self.extra_bytes = max(_read_status("VmHWM") - self._start, 0)


def _read_status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class RunLogger:
    """Writes one step's numbers to TensorBoard and ``metrics.jsonl``, and shows a progress bar; rank 0 only."""

    def __init__(
        self, folder: Path, *, is_main: bool, tensorboard: bool, progress_bar: bool, start_step: int, total_steps: int
    ) -> None:
        """Open the files.

        Args:
            folder: of the stage.
            is_main: whether this process shows anything.
            tensorboard, progress_bar: whether to write and show them.
            start_step: points after it, left by an interrupted run, are taken back.
            total_steps: most steps.
        """
        self._writer: Any = None
        self._known: set[tuple[Any, ...]] = set()
        self._file: Any = None
        self._bar: Any = tqdm(
            total=total_steps, initial=start_step, desc=folder.name, disable=not (is_main and progress_bar), unit="step"
        )
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= start_step]
        with open_atomic(path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        # A run that went on from here before, and was killed again, may have made the last step's points already.
        self._known = {(line["step"], *list(line)[1:]) for line in kept if line["step"] == start_step}
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of a step; the same ones again are left out."""
        if self._file is None or (step, *values) in self._known:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def log_text(self, tag: str, text: str) -> None:
        """Record a text, such as the first prompt."""
        if self._writer is not None:
            self._writer.add_text(tag, f"```\n{text}\n```", 0)

    def advance(self, step: int, shown: Mapping[str, str]) -> None:
        """Move the progress bar."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Close the files; safe to call twice."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl; a last line that a crash cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def log_report(folder: Path, markdown: str, figures: Mapping[str, Path]) -> None:
    """Show a report and its figures (PNG files) in TensorBoard."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    writer.add_text("report", markdown, 0)
    for name, path in figures.items():
        image = imread(str(path))[..., :3]
        writer.add_image(f"report/{Path(name).stem}", image, 0, dataformats="HWC")
    writer.close()
