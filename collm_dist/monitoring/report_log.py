"""The report in TensorBoard, and the run's row in its table of hyperparameters and final metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from collm_dist.monitoring.tags import build_layout


@dataclass(frozen=True)
class RunSettings:
    """A row of TensorBoard's hyperparameter table.

    Attributes:
        run: name of the run; runs of the same name share a row.
        settings: numbers, booleans and strings by name.
        metrics: final metrics by tag.
    """

    run: str
    settings: Mapping[str, float | bool | str]
    metrics: Mapping[str, float]


def log_report(folder: Path, markdown: str, figures: Mapping[str, Path], settings: RunSettings) -> None:
    """Write a report, its figures (PNG files by name) and the run's hyperparameters as TensorBoard events."""
    from matplotlib.image import imread
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_custom_scalars(build_layout())
        writer.add_text("report", markdown, 0)
        for name, path in figures.items():
            writer.add_image(f"report/{Path(name).stem}", imread(str(path))[..., :3], 0, dataformats="HWC")
        # No experiment description is written: TensorBoard uses a single one for all runs and would hide the settings
        # that it lacks.
        writer.file_writer.add_summary(hparams_pb(settings.settings, trial_id=settings.run))
        for tag, value in settings.metrics.items():
            writer.add_scalar(tag, value, 0)
