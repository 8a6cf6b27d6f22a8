"""Errors keep their class, message, exit code and retryability across processes."""

import pickle

import pytest

from collm_dist import errors
from collm_dist.errors import CollmError, DataError, Interrupted, WorkerLostError, as_collm_error
from collm_dist.runs.error_file import ERROR_FILE_VARIABLE, read_error, write_error

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CollmError) and kind not in (CollmError, errors.StepError)
]
SENDERS = [lambda error: CollmError.from_dict(error.to_dict()), lambda error: pickle.loads(pickle.dumps(error))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "send", [lambda error: CollmError.from_dict(error.to_dict()), lambda e: pickle.loads(pickle.dumps(e))]
)
def test_an_error_crosses_processes(kind, send):
    error = kind("row 3 is wrong")
    received = send(error)
    assert received.to_dict() == error.to_dict()
    assert (received.name, received.remedy) == (kind.__name__, kind.remedy)
    assert type(received) is kind


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("x")])
def test_other_exceptions_keep_their_name(error):
    known = as_collm_error(error)
    received = CollmError.from_dict(known.to_dict())
    assert type(received) is type(known)
    assert received.to_dict() == known.to_dict()
    assert received.name == type(error).__name__
    assert isinstance(received, Interrupted) == isinstance(error, KeyboardInterrupt)


def test_the_first_error_of_a_job_stays_unless_it_is_a_lost_worker(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    assert read_error(path) is None
    write_error(DataError("nowhere to write"))
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(path))
    for error in (WorkerLostError("process 1"), DataError("bad row"), WorkerLostError("process 2"), DataError("later")):
        write_error(error)
    assert str(read_error(path)) == "bad row"
