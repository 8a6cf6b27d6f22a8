"""Pushes of an export to a server with the Hub's interface on the loopback, and their refusals."""

import json
import subprocess
import sys

import pytest

from collm_dist.serving.export import INDEX
from tests.conftest import REPOSITORY
from tests.integration.hub_server import READER, WRITER, serve_hub


@pytest.fixture
def hub():
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def push(hub, finished_run, tmp_path, monkeypatch):
    """Return a function that runs the command and returns exit code, output and errors."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # Large files as plain HTTP: the other way needs a native library's own servers.
    for name, value in (("HF_ENDPOINT", hub.endpoint), ("HF_HOME", tmp_path / "hf"), ("HF_HUB_DISABLE_XET", "1"),
                        ("NO_PROXY", "127.0.0.1")):  # fmt: skip
        monkeypatch.setenv(name, str(value))

    def run(*arguments, token=WRITER, repo="me/films"):
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        command = [sys.executable, "launch/export_model.py", "--config", str(finished_run / "config.yaml"),
                   "--output", str(tmp_path / "exported"), "--push-to-hub", repo, *arguments]  # fmt: skip
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        assert str(token) not in done.stdout + done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_private_repository_gets_the_export(push, hub, tmp_path):
    code, out, err = push("--data-license", "internal use", "--license", "My Own Licence")
    assert code == 0, err
    repo = hub.repos["me/films"]
    assert repo.private
    assert out.splitlines()[-1] == f"{hub.endpoint}/me/films/commit/{1:040x}"
    exported = read_files(tmp_path / "exported")
    assert repo.files == exported
    assert b'license: "other"\nlicense_name: "my-own-licence"' in exported["README.md"]


@pytest.mark.slow
def test_a_repository_gets_the_successor_of_its_export(push, hub, tmp_path):
    code, _, err = push()
    assert code == 0, err
    repo = hub.repos["me/films"]
    exported = read_files(tmp_path / "exported")
    repo.files["left.over"] = b"x"
    code, _, err = push()  # the folder is there: it is pushed as it is
    assert code == 0, err
    assert repo.files == exported
    assert len(repo.commits) == 2
    code, _, err = push("--license", "mit")
    assert code == 2
    assert "has other licences" in err
    code, _, err = push("--public", "--publish-events")
    assert code == 2
    assert "exists and is private; leave --public out" in err
    assert len(repo.commits) == 2


@pytest.mark.slow
def test_an_upload_that_breaks_off_goes_on(push, hub, tmp_path):
    hub.broken = True
    code, _, err = push()
    assert code == 2
    assert "HubError" in err
    assert (tmp_path / "exported" / INDEX).exists()
    hub.broken = False
    assert push()[0] == 0
    assert hub.repos["me/films"].files == read_files(tmp_path / "exported")


@pytest.mark.slow
def test_who_may_read_it_is_said(push, hub, tmp_path):
    code, _, err = push("--public")
    assert (code, hub.repos) == (2, {})
    assert "--without-events, or add --publish-events" in err
    assert not (tmp_path / "exported").exists()
    code, _, err = push("--public", "--without-events")
    assert code == 0, err
    repo = hub.repos["me/films"]
    assert not repo.private
    assert not any(name.startswith("data/interactions") for name in repo.files)
    assert not json.loads(repo.files[INDEX])["with_events"]
    code, _, err = push("--without-events")
    assert code == 2
    assert "exists and is public; add --public" in err
    code, _, err = push()  # the folder has none
    assert code == 2
    assert "without events; choose a new folder" in err
    (tmp_path / "exported").rename(tmp_path / "first")
    code, _, err = push("--public", "--publish-events")
    assert code == 0, err
    assert any(name.startswith("data/interactions") for name in repo.files)
    (tmp_path / "exported").rename(tmp_path / "second")
    code, _, err = push("--public", "--without-events")
    assert code == 2
    assert "its history would keep them" in err


@pytest.mark.slow
def test_refusals_say_what_to_do_and_leave_no_folder(push, hub, tmp_path, monkeypatch):
    cases = [
        ({"token": None}, "there is no token; set HF_TOKEN, or log in"),
        ({"token": "hf_wrong"}, "HTTP 401: the token is not valid"),
        ({"token": READER}, "HTTP 403: the token may not write there"),
        ({"repo": "me/films/more"}, "give OWNER/NAME"),
    ]
    for arguments, message in cases:
        code, _, err = push(**arguments)
        assert code == 2, err
        assert message in err, err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = push()
    assert code == 2
    assert "the Hub cannot be reached" in err
    assert "check the network and HF_ENDPOINT" in err
    assert not (tmp_path / "exported").exists()
    assert hub.repos == {}


@pytest.mark.slow
def test_flags_of_a_push_need_a_push(finished_run, tmp_path):
    command = [sys.executable, "launch/export_model.py", "--config", str(finished_run / "config.yaml"),
               "--output", str(tmp_path / "exported"), "--public"]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "add --push-to-hub OWNER/NAME" in done.stderr
