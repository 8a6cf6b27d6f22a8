"""status.json: always complete, with the next action for the user."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from collm_dist.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    DataError,
    InternalError,
    LaunchError,
    NonFiniteError,
    StepError,
    as_collm_error,
)
from collm_dist.runs.status import RunStatus


def test_nothing_is_written_before_the_lock_is_ours(tmp_path):
    status = RunStatus(tmp_path / "status.json")
    status.end(LaunchError("somebody is there"))
    assert not (tmp_path / "status.json").exists()
    assert json.loads(status.line)["message"] == "somebody is there"


def test_a_run_from_begin_to_end(tmp_path):
    path = tmp_path / "status.json"
    status = RunStatus(path)
    status.begin()
    status.enter("cf")
    running = json.loads(path.read_text())
    assert (running["state"], running["step"]) == ("running", "cf")
    status.end()
    done = json.loads(path.read_text())
    assert (done["state"], done["exit_code"], done["error"]) == ("done", 0, None)
    assert json.loads(status.line) == done
    assert "\n" not in status.line


@pytest.mark.parametrize("kind", [ConfigError, DataError, ArtifactError, CheckpointError, LaunchError])
def test_every_error_has_a_remedy(tmp_path, kind):
    status = RunStatus(tmp_path / "status.json")
    status.begin()
    status.end(kind("this is wrong"))
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["error"], found["exit_code"]) == ("failed", kind.__name__, kind.exit_code)
    assert found["retryable"] == kind.retryable
    assert found["remedy"] == kind.remedy


def test_the_error_of_a_step_keeps_its_name_code_and_remedy(tmp_path):
    status = RunStatus(tmp_path / "status.json")
    status.end(StepError(NonFiniteError("step 3")))
    ended = json.loads(status.line)
    assert (ended["error"], ended["message"], ended["exit_code"]) == ("NonFiniteError", "step 3", 4)
    assert ended["remedy"] == NonFiniteError.remedy


def test_interruptions_and_faults(tmp_path):
    status = RunStatus(tmp_path / "status.json")
    status.end(as_collm_error(KeyboardInterrupt()))
    assert json.loads(status.line)["state"] == "interrupted"
    assert json.loads(status.line)["retryable"] is True
    status.end(as_collm_error(ZeroDivisionError("x")))
    assert json.loads(status.line)["remedy"] == InternalError.remedy


def test_readers_never_see_a_part(tmp_path):
    path = tmp_path / "status.json"
    status = RunStatus(path)
    status.begin()
    reads = 0
    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(lambda: [status.beat() for _ in range(20)]) for _ in range(3)]
        while reads < 20 or not all(writer.done() for writer in writers):
            assert json.loads(path.read_text())["state"] == "running"
            reads += 1
    assert all(len(writer.result()) == 20 for writer in writers)
    assert [found.name for found in tmp_path.iterdir()] == ["status.json"]
