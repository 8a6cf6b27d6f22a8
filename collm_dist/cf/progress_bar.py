"""Progress bar of a CF training, driven by the log that a worker writes: workers have no terminal."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from collm_dist.monitoring import TRAIN_LOSS, VALID_AUC, read_metrics
from collm_dist.phases import keep_alive

_SHOWN = (TRAIN_LOSS, VALID_AUC)
_POLL_SECONDS = 0.5


@contextmanager
def show_progress(log_path: Path, num_epochs: int, folds: Sequence[Path] = ()) -> Iterator[None]:
    """Show a bar that follows a ``metrics.jsonl`` while the block runs.

    Args:
        log_path: file that a worker appends a line to after each epoch.
        num_epochs: length of the bar.
        folds: checkpoint folders of the models of time folds, which are fitted before the model that the log is of.
    """
    done = threading.Event()

    def follow() -> None:
        with tqdm(total=num_epochs, desc="cf", unit="epoch", leave=False) as bar:
            while not done.wait(_POLL_SECONDS):
                lines = read_metrics(log_path)
                if lines:
                    last = lines[-1]
                    bar.set_postfix({tag: f"{last[tag]:.4f}" for tag in _SHOWN if tag in last}, refresh=False)
                    bar.update(last["step"] - bar.n)
                elif folds:
                    bar.set_postfix_str(f"time fold {_count_begun(folds)} of {len(folds)}", refresh=False)
                keep_alive(bar)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _count_begun(folds: Sequence[Path]) -> int:
    """Return the number of folds that have been begun, by their checkpoints."""
    return max(1, sum(folder.exists() for folder in folds))
