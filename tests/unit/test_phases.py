"""Phases that say what is being done and how far it is."""

import time

import pytest
from tqdm import tqdm

from collm_dist import phases
from collm_dist.phases import follow, keep_alive, show_phase, show_phases


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setattr(phases, "_DELAY_SECONDS", 0.02)
    show_phases(True)
    yield
    show_phases(False)


def test_a_phase_that_takes_long_says_how_far_it_is(shown, capsys):
    with show_phase("hashing", 2048, "B") as phase:
        phase.advance(1024)
        time.sleep(0.1)
    assert "hashing:  50%" in (printed := capsys.readouterr().err)
    assert "1.02k/2.05k" in printed
    for _ in follow(["a", "b"], "copying", "files"):
        time.sleep(0.05)
    assert "copying: 100%" in (printed := capsys.readouterr().err)
    assert "2/2" in printed
    with show_phase("merging"):
        time.sleep(0.05)
    assert "merging: 00:0" in capsys.readouterr().err


def test_it_shows_nothing_if_it_is_short_or_nobody_asked(shown, capsys):
    with show_phase("short"):
        pass
    show_phases(False)
    with show_phase("hidden"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_an_error_ends_the_phase(shown, capsys):
    with pytest.raises(ValueError, match="stop"), show_phase("failing"):
        raise ValueError("stop")


def test_a_bar_that_is_switched_off_stays_so(capsys):
    with tqdm(total=1, disable=True) as bar:
        keep_alive(bar)
    assert capsys.readouterr().err == ""
