"""Permission to run code that a finished run names: granted by the caller, never by the run's own files.

A run can name code in ``llm.trust_remote_code`` (the folder of its backbone), in ``cf.model`` (a module) and in the
headers of its collaborative models. Runs that were trained by this account are known by the SHA-256 of their records,
kept outside the run in the cache folder. For any other run the caller has to say that its code is trusted.
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

from collm_dist.assets import get_cache_dir
from collm_dist.config import Config
from collm_dist.errors import ArtifactError
from collm_dist.runs.atomic_files import compute_file_hash
from collm_dist.runs.run_dir import STAGES, RunDir, Step

FLAG = "--trust-remote-code"
_MAX_HEADER_BYTES = 100 << 20


def list_code(config: Config, origin: Path, cf_dir: Path) -> list[str]:
    """Return a line for each place of a run that makes code run when its model is loaded.

    Args:
        config: the run's settings.
        origin: file of the settings, for the lines.
        cf_dir: folder of the collaborative models, whose headers name their class.
    """
    lines = []
    if config.llm.trust_remote_code:
        lines.append(f"{origin}: llm.trust_remote_code: true (Python files in the backbone's folder)")
    if ":" in config.cf.model:
        lines.append(f"{origin}: cf.model: {config.cf.model}")
    for path in sorted(cf_dir.glob("*.safetensors")):
        model = read_model_name(path)
        if ":" in model:
            lines.append(f"{path}: model: {model}")
    return lines


def read_model_name(path: Path) -> str:
    """Return the class that the header of a model file names, without loading it; empty if it cannot be read."""
    with suppress(OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, _MAX_HEADER_BYTES)))
        return str(json.loads(header["__metadata__"]["model"]))
    return ""


def check_code(config: Config, run_dir: RunDir) -> None:
    """Check that loading a finished run executes no code but that of runs trained by this account.

    Raises:
        ArtifactError: it would; the message names the files, the settings and the flag.
    """
    code = list_code(config, run_dir.path / "config.yaml", run_dir.step_dir("cf"))
    if code and not all(_find_mark(run_dir, step).exists() for step in _list_done(run_dir)):
        refuse_code(code, run_dir.path)


def refuse_code(code: list[str], folder: Path) -> None:
    """Raise ArtifactError with the lines of ``list_code``."""
    raise ArtifactError(
        f"{folder} names code and was not trained by this account, so the code is not run:\n  "
        + "\n  ".join(code)
        + f"\nRead that code. If you trust its author, give {FLAG} (in Python: trust_code=True)"
    )


def keep_trust(config: Config, run_dir: RunDir, step: Step) -> None:
    """Remember that this account trained a step, or accepted its code, if the run names code."""
    if not list_code(config, run_dir.path / "config.yaml", run_dir.step_dir("cf")):
        return
    mark = _find_mark(run_dir, step)
    with suppress(OSError):  # without a cache folder the flag is needed
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def keep_trust_in_all(config: Config, run_dir: RunDir) -> None:
    """Remember that the code of a whole run is accepted."""
    for step in _list_done(run_dir):
        keep_trust(config, run_dir, step)


def _list_done(run_dir: RunDir) -> list[Step]:
    steps: tuple[Step, ...] = ("cf", *STAGES)
    return [step for step in steps if run_dir.record_path(step).is_file()]


def _find_mark(run_dir: RunDir, step: Step) -> Path:
    return get_cache_dir() / "own_runs" / compute_file_hash(run_dir.record_path(step))
