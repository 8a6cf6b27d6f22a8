"""Errors of Ray tasks, as commands report them."""

import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from collm_dist.errors import DataError, LaunchError
from collm_dist.orchestration.cluster import explain_task_error


def explain(error):
    return explain_task_error(error, "scoring", "lower --num-actors")


def raise_in_task(cause):
    """Return the error that ``ray.get`` raises for a task that has raised an error."""
    return RayTaskError("score", "Traceback ...", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("cause", "shown"),
    [(MemoryError("Unable to allocate 8 EiB"), "Unable to allocate 8 EiB"), (MemoryError(), "Memory")],
)
def test_a_lack_of_memory_in_a_task_names_the_remedy(cause, shown):
    error = explain(raise_in_task(cause))
    assert isinstance(error, LaunchError)
    assert str(error).startswith(f"scoring: a Ray task ran out of memory ({shown}")
    assert str(error).endswith("; lower --num-actors, and run the same command again to resume")


@pytest.mark.parametrize("error", [WorkerCrashedError(), raise_in_task(OSError("no space"))])
def test_a_lost_process_and_a_failed_disk_name_the_remedy_of_the_caller(error):
    found = explain(error)
    assert isinstance(found, LaunchError)
    assert str(found).endswith("if memory was short, lower --num-actors")


def test_errors_for_users_and_bugs_are_raised_as_they_are():
    cause, bug = DataError("ratings.csv is empty"), raise_in_task(KeyError("x"))
    assert explain(raise_in_task(cause)) is cause
    assert explain(bug) is bug
