"""Errors named by who must act. Each carries the exit code of the command that ends with it.

A message says what is wrong, where (file, row, field), and what to do about it. Commands print it without a
traceback; a traceback is kept for our own bugs.
"""

from __future__ import annotations


class CollmError(Exception):
    """Base of all errors that a user can act on.

    Attributes:
        exit_code: exit status of a command that ends with this error.
        retryable: whether running the same command again can succeed without a change.
        is_common: whether all processes of a job find it alike, so that one says it for all.
    """

    exit_code: int = 2
    retryable: bool = False
    is_common: bool = False

    @property
    def name(self) -> str:
        """What the error is called in messages and in ``status.json``."""
        return type(self).__name__


class ConfigError(CollmError):
    """The configuration is wrong: whoever wrote the YAML or the overrides must act."""

    is_common = True


class DataError(CollmError):
    """The input data is wrong, missing or not what was promised."""

    is_common = True


class RequestError(DataError):
    """A request for scores is wrong: whoever sent it must act."""


class ArtifactError(CollmError):
    """Something that an earlier step made is missing, damaged or does not belong to this run."""

    is_common = True


class CheckpointError(CollmError):
    """A checkpoint cannot be read or belongs to another run."""


class LaunchError(CollmError):
    """The surroundings are wrong: devices, processes, cluster, disk."""

    exit_code = 3
    retryable = True


class Preempted(CollmError):
    """The job was asked to stop; what it has saved is there, and it goes on when run again."""

    exit_code = 75
    retryable = True
    is_common = True


class WorkerLostError(CollmError):
    """A process died or hangs, so that the others cannot go on; what they have saved is there."""

    exit_code = 76
    retryable = True


class DiskError(LaunchError):
    """A file cannot be written: the disk is full, or writing is not allowed there."""
