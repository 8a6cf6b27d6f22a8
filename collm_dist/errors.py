"""Error classes, named by who must act, and their form across processes.

A message says what is wrong, where (file, row, setting), and what to do about it. Commands print it without a traceback
and end with the error's exit code; only an ``InternalError``, a bug of this package, has a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_RESUME = "run the same command again; it resumes from the last checkpoint"


class CollmError(Exception):
    """Base class of all errors of the package.

    Attributes:
        name: class name in messages and in ``status.json``.
        exit_code: exit status of a command that ends with this error.
        retryable: whether the same command can succeed without a change.
        is_common: whether all processes of a job raise it alike, so that only the first one prints it.
        remedy: advice in ``status.json``.
    """

    exit_code: int = 2
    retryable: bool = False
    is_common: bool = False
    remedy: str = "correct what the message names, then run the same command again"

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.name = type(self).__name__

    def to_dict(self) -> dict[str, Any]:
        """Return the error as JSON: ``error`` (its name), ``message``, ``exit_code``, ``retryable``."""
        return {
            "error": self.name,
            "message": str(self),
            "exit_code": self.exit_code,
            "retryable": self.retryable,
        }

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> CollmError:
        """Return the error that ``to_dict`` described, possibly in another process."""
        kinds = {kind.__name__: kind for kind in _iter_subclasses(CollmError)} | {"KeyboardInterrupt": Interrupted}
        error = kinds.get(record["error"], InternalError)(record["message"])
        error.name, error.exit_code, error.retryable = record["error"], record["exit_code"], record["retryable"]
        return error


def _iter_subclasses(kind: type[CollmError]) -> Iterator[type[CollmError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _iter_subclasses(subclass)


class ConfigError(CollmError):
    """Wrong configuration: the author of the YAML file or the overrides must act."""

    is_common = True
    remedy = "correct the settings that the message names, then run the same command again"


class DataError(CollmError):
    """Wrong or missing input data."""

    is_common = True
    remedy = "correct the input, or the settings that say how to read it, then run the same command again"


class RequestError(DataError):
    """Wrong request for scores: its sender must act."""


class ArtifactError(CollmError):
    """Missing or damaged result of an earlier step, or one that does not belong to this run."""

    is_common = True
    remedy = "redo the step that the message names with --force STEP, or set run.dir to a new directory"


class CheckpointError(CollmError):
    """Checkpoint that cannot be read or belongs to another run."""

    remedy = "remove the checkpoint that the message names, or redo its stage with --force STEP"


class DamagedCheckpointError(CheckpointError):
    """File that is not a complete checkpoint."""


class LaunchError(CollmError):
    """Wrong environment: devices, processes, cluster, disk."""

    exit_code = 3
    retryable = True
    remedy = "run the same command again once the cause is gone; finished steps are kept"


class DiskError(LaunchError):
    """File that cannot be written: the disk is full or read-only, or permission is missing."""

    remedy = "make space or allow writing where the message says, then run the same command again"


class NonFiniteError(CollmError):
    """Loss or gradient that is not finite; no weight was updated with it."""

    exit_code = 4
    is_common = True
    remedy = "lower the learning rate of the stage, then run the same command again"


class Preempted(CollmError):
    """Request to stop, by SIGTERM or SIGUSR1; the same command resumes from the last checkpoint."""

    exit_code = 75
    retryable = True
    is_common = True
    remedy = _RESUME


class WorkerLostError(CollmError):
    """Process that died or hangs, so that the others cannot continue; the last checkpoint remains."""

    exit_code = 76
    retryable = True
    remedy = _RESUME


class QueueFullError(CollmError):
    """Full queue of the ranking service: the client must try again later."""

    retryable = True


class HubError(CollmError):
    """Upload to the Hub that fails: no token, no network, no permission."""

    retryable = True
    remedy = "do what the message says, then run the same command again; it uploads the export that is there"


class EventStoreError(LaunchError):
    """Store of fresh events that does not answer: the client must try again later."""


class StepError(CollmError):
    """Error of a step that ran in processes of its own, which have printed it."""

    def __init__(self, cause: CollmError) -> None:
        super().__init__(str(cause))
        self.name, self.exit_code, self.retryable = cause.name, cause.exit_code, cause.retryable
        self.remedy = cause.remedy


class Interrupted(CollmError):
    """Ctrl-C."""

    exit_code = 130
    retryable = True
    remedy = "run the same command again; it resumes"


class InternalError(CollmError):
    """Bug of this package."""

    exit_code = 1
    remedy = "this is a bug of the program: report it with the traceback"


def as_collm_error(error: BaseException) -> CollmError:
    """Return the error itself, or the error that reports Ctrl-C or an unexpected exception."""
    if isinstance(error, CollmError):
        return error
    name = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        known: CollmError = Interrupted("interrupted; run the same command again to resume")
    else:
        known = InternalError(f"internal error, please report it: {name}: {error}")
    known.name = name
    return known


def is_interruption(error: CollmError) -> bool:
    """Return whether an error, perhaps of another process, means that a signal ended the work."""
    return error.exit_code in (Interrupted.exit_code, Preempted.exit_code)
