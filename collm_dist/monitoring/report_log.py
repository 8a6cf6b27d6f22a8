"""The report in TensorBoard, and the run's row in its table of hyperparameters and final metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from collm_dist.monitoring.tags import build_layout

# Pictures of a Markdown text: the tab Text shows none from files.
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


@dataclass(frozen=True)
class RunSettings:
    """A row of TensorBoard's hyperparameter table.

    Attributes:
        run: name of the run; runs of the same name share a row.
        settings: numbers, booleans and strings by name.
        metrics: final metrics by name.
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
        text = _PICTURE.sub(lambda match: f"*{match[1]}*: tab Images, `{_name_image(match[2])}`", markdown)
        writer.add_text("report", text, 0)
        for name, path in figures.items():
            writer.add_image(_name_image(name), imread(str(path))[..., :3], 0, dataformats="HWC")
        # No experiment description is written: TensorBoard uses a single one for all runs and would hide the settings
        # that it lacks. Final metrics are columns as well, because scalars would be charts of a single point.
        columns = {**settings.settings, **settings.metrics}
        writer.file_writer.add_summary(hparams_pb(columns, trial_id=settings.run))


def _name_image(file_name: str) -> str:
    # The tab Time series has images too, sorted by name: after losses and validation metrics.
    return f"views/{Path(file_name).stem}"
