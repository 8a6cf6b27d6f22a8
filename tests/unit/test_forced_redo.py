"""A redo that was begun by ``--force`` and interrupted."""

import json
from contextlib import suppress

import pytest

from collm_dist.runs.forced_redo import has_begun, note_begun, track_redo
from collm_dist.runs.run_dir import RunDir

NOW, OTHER = {"config.cf.embedding_dim": 8}, {"config.cf.embedding_dim": 16}


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


def call(run_dir, *steps, begins=(), ends=False, is_owner=True):
    """Make a call of a command that redoes steps, begins some of them, and is interrupted unless it ends."""
    with suppress(KeyboardInterrupt), track_redo(run_dir, steps, is_owner=is_owner) as begun:
        found = list(begun), [step for step in ("data", "cf", "stage1") if has_begun(run_dir, step, NOW)]
        for step in begins:
            note_begun(run_dir, step, NOW)
        if not ends:
            raise KeyboardInterrupt
    return found


def test_the_same_command_resumes(run_dir, capsys):
    assert call(run_dir, "data", "cf", begins=["data"]) == ([], [])
    assert capsys.readouterr().out == ""
    assert call(run_dir, "data", "cf", begins=["cf"]) == (["data"], ["data"])
    assert f"delete {run_dir.path / '.redo.json'}" in capsys.readouterr().out
    assert call(run_dir, "data", "cf", ends=True) == (["cf", "data"], ["data", "cf"])


def test_after_its_end_the_same_command_starts_from_scratch(run_dir):
    call(run_dir, "cf", begins=["cf"])
    call(run_dir, "cf", ends=True)
    assert call(run_dir, "cf") == ([], [])
    assert not list(run_dir.path.iterdir())


@pytest.mark.parametrize("other", [["cf", "stage1"], ["data"], []])
def test_another_command_begins_anew_and_ends_the_redo(run_dir, other):
    call(run_dir, "cf", begins=["cf"])
    assert call(run_dir, *other) == ([], [])
    assert call(run_dir, "cf") == ([], [])


def test_child_processes_use_their_parents_record(run_dir):
    with suppress(KeyboardInterrupt), track_redo(run_dir, ["cf", "stage1"], is_owner=True):
        call(run_dir, "stage1", begins=["stage1"], is_owner=False)
        raise KeyboardInterrupt
    assert call(run_dir, "cf", "stage1") == (["stage1"], ["stage1"])


def test_with_other_settings_a_step_starts_from_scratch(run_dir):
    call(run_dir, "cf", begins=["cf"])
    assert has_begun(run_dir, "cf", NOW)
    assert not has_begun(run_dir, "cf", OTHER)


def test_a_step_that_was_damaged_meanwhile_starts_from_scratch(run_dir):
    call(run_dir, "cf", begins=["cf"])
    run_dir.write_record("cf", {"files": {"model.safetensors": "0" * 64}})
    assert not has_begun(run_dir, "cf", NOW)


def test_without_a_command_nothing_is_recorded(run_dir):
    note_begun(run_dir, "cf", NOW)
    assert not list(run_dir.path.iterdir())


@pytest.mark.parametrize("text", ["{", "[1]", '{"steps": ["cf"], "begun": 3}', '{"steps": ["cf"], "begun": {"cf": 1}}'])
def test_a_damaged_record_is_that_of_no_redo(run_dir, text):
    (run_dir.path / ".redo.json").write_text(text)
    assert call(run_dir, "cf", begins=["cf"]) == ([], [])
    assert json.loads((run_dir.path / ".redo.json").read_text()) == {"steps": ["cf"], "begun": {"cf": NOW}}
