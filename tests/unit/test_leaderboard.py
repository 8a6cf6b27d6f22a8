"""Leaderboard of a search: order of trials, undefined metrics, reasons of failures."""

import json
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from collm_dist.config.loader import change_settings, load_config
from collm_dist.errors import ArtifactError, ConfigError
from collm_dist.orchestration.leaderboard import (
    SearchResult,
    Trial,
    choose_metric,
    print_leaderboard,
    rank_trials,
    run_once,
    suggest_command,
    write_results,
)
from collm_dist.runs.run_dir import RunDir
from tests.conftest import REPOSITORY

RATES = [1e-4, 2e-4, 3e-4, 4e-4]


def make_trial(number, state="finished", error="", **metrics):
    return Trial(number, {"stage1.learning_rate": RATES[number]}, state, 4, 2, metrics, error)


@pytest.fixture
def write(repository, tmp_path):
    """Return a function that ranks trials by UAUC, writes and prints the leaderboard, and returns summary and rows."""
    config = load_config(repository / "configs" / "tiny_cpu.yaml", [])

    def run(trials) -> tuple[dict, list[dict], Path]:
        result = SearchResult(
            name="stage1 search",
            metric="uauc",
            metrics=("uauc", "auc", "logloss"),
            space={"stage1.learning_rate": {"log_uniform": (1e-4, 1e-2)}},
            unit="step",
            curves={trial.number: [(2, 0.5), (4, 0.6)] for trial in trials if trial.metrics},
            next_command="python launch/train.py --stage 1 --config",
        )
        summary = write_results(
            result, tmp_path, rank_trials(trials, "uauc"), lambda settings: change_settings(config, settings)
        )
        print_leaderboard(result, summary, tmp_path)
        return summary, pq.read_table(tmp_path / "leaderboard.parquet").to_pylist(), tmp_path

    return run


def test_trials_are_ranked_by_their_metric(write, capsys):
    trials = [make_trial(0, uauc=0.5, logloss=0.6), make_trial(1, uauc=0.7, logloss=0.9), make_trial(2, "failed")]
    summary, rows, _ = write(trials)
    assert (summary["metric"], summary["best"], [row["trial"] for row in rows]) == ("uauc", 1, [1, 0, 2])
    assert "undefined" not in capsys.readouterr().out


def test_an_undefined_metric_gives_way_to_logloss(write, capsys):
    trials = [
        make_trial(0, logloss=0.7),
        make_trial(1, logloss=0.6),
        make_trial(2, "stopped", logloss=0.5),
        make_trial(3, "failed"),
    ]
    summary, rows, folder = write(trials)
    assert (summary["metric"], summary["best"], [row["trial"] for row in rows]) == ("logloss", 1, [2, 1, 0, 3])
    assert [row["valid_uauc"] for row in rows] == [None] * 4
    assert load_config(folder / "best.yaml").stage1.learning_rate == RATES[1]
    assert (folder / "leaderboard.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "4 trials by valid logloss" in printed
    assert "uauc is undefined on the validation rows: logloss (lower is better) compares the trials" in printed


def test_trials_without_a_metric_that_others_have_come_last(write):
    trials = [make_trial(0, logloss=0.1), make_trial(1, uauc=0.6, logloss=0.9), make_trial(2, "stopped", uauc=0.5)]
    summary, rows, _ = write(trials)
    assert (summary["metric"], summary["best"], [row["trial"] for row in rows]) == ("uauc", 1, [1, 2, 0])


def test_a_metric_that_only_stopped_trials_have_compares_none():
    assert (
        choose_metric([make_trial(0, logloss=0.1), make_trial(1, "stopped", uauc=0.5, logloss=0.2)], "uauc")
        == "logloss"
    )
    assert choose_metric([make_trial(0, "failed")], "uauc") == "uauc"


def test_the_reason_of_a_failure_is_shown(write, capsys):
    trials = [make_trial(0, uauc=0.5, logloss=0.6), make_trial(1, "failed", "a margin needs a guard")]
    _, rows, _ = write(trials)
    assert [row["error"] for row in rows] == ["", "a margin needs a guard"]
    assert (
        "1 of the trials failed; leaderboard.parquet has the errors. Trial 1: a margin needs" in capsys.readouterr().out
    )


def test_the_command_that_uses_the_best_settings_does_not_meet_a_finished_step(tmp_path):
    run_dir = RunDir(tmp_path / "my run")
    command = "python launch/train.py --stage 1 --config"
    assert suggest_command(run_dir, "stage1", command) == command
    run_dir.write_record("stage1", {"stage": "stage1"})
    suggested = shlex.split(suggest_command(run_dir, "stage1", command))
    assert suggested[:2] == ["python", "launch/run_pipeline.py"]
    overrides = [argument for argument in suggested[2:] if "=" in argument]
    config = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml", overrides)
    assert (config.run.dir, config.run.reuse) == (f"{run_dir.path}_searched", (str(run_dir.path),))


def refuse():
    raise ConfigError("lightgnc is not a model")


def start(folder, settings, search=dict):
    return run_once(folder, folder.parent, "cf", settings, print, search)


def test_a_search_that_was_refused_before_its_first_trial_does_not_claim_its_folder(tmp_path):
    folder = tmp_path / "cf_search"
    with pytest.raises(ConfigError, match="lightgnc"):
        start(folder, {"model": "lightgnc"}, refuse)
    (folder / "trials" / "000" / "checkpoints").mkdir(parents=True)
    (folder / "journal.jsonl").write_text("of the refused search")
    assert start(folder, {"model": "lightgcn"}, lambda: {"best": 0}) == {"best": 0}
    assert not (folder / "journal.jsonl").exists()
    assert json.loads((folder / "plan.json").read_text()) == {"model": "lightgcn"}


@pytest.mark.parametrize("left", ["trials/000/config.yaml", "summary.json"])
def test_a_search_with_trials_keeps_its_folder(tmp_path, left):
    folder = tmp_path / "cf_search"
    with pytest.raises(ConfigError, match="lightgnc"):
        start(folder, {"model": "mf"}, refuse)
    (folder / left).parent.mkdir(parents=True, exist_ok=True)
    (folder / left).write_text("{}")
    with pytest.raises(ArtifactError, match="holds a search with other settings or inputs:\n  model: mf -> lightgcn"):
        start(folder, {"model": "lightgcn"})
    assert (folder / left).exists()
