"""Settings of MLflow, and what a run sends there; the server itself is in the slow tier."""

import threading

import pytest

from collm_dist.config.loader import load_config
from collm_dist.errors import ConfigError
from collm_dist.monitoring import track_run
from collm_dist.monitoring.run_tracker import list_report_metrics
from collm_dist.runs.run_dir import RunDir
from tests.conftest import REPOSITORY

CONFIG = REPOSITORY / "configs" / "tiny_cpu.yaml"


@pytest.mark.parametrize(
    "uri",
    ["http://me:hidden-word@host:5000", "https://hidden-word@host", "http://host?token=hidden-word", "hidden-word"],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(uri):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIG, [f"monitoring.mlflow.tracking_uri={uri}"])
    if uri == "hidden-word":
        assert "is not the address of a server" in str(error.value)
    else:
        assert "MLFLOW_TRACKING_TOKEN" in str(error.value)
        assert "hidden-word" not in str(error.value)


@pytest.mark.parametrize("setting", ["alias=latest", "alias=v3", "alias=3", "registered_model=a/b", "experiment="])
def test_names_that_mlflow_refuses_are_refused_before_work(setting):
    with pytest.raises(ConfigError, match=f"monitoring.mlflow.{setting.partition('=')[0]}"):
        load_config(CONFIG, [f"monitoring.mlflow.{setting}"])


@pytest.mark.parametrize(
    "overrides, is_owner",
    [([], True), pytest.param(["monitoring.mlflow.tracking_uri=http://127.0.0.1:9"], False, marks=pytest.mark.slow)],
)
def test_nothing_is_sent_unless_asked_for_and_by_the_owner_of_the_run_alone(overrides, is_owner, tmp_path, monkeypatch):
    if overrides:
        pytest.importorskip("mlflow", reason="needs pip install 'collm-dist[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with track_run(load_config(CONFIG, overrides), RunDir(tmp_path), (), is_owner=is_owner):
        assert "tracker" not in [thread.name for thread in threading.enumerate()]
    assert list(tmp_path.iterdir()) == []


def test_the_reports_rows_become_metrics():
    row = {"split": "test", "slice": "all", "rows": 9, "users_counted": 3, "auc": 0.6, "auc_low": 0.5, "ndcg@10": 0.2}
    rows = [row | {"model": "stage2"}, row | {"model": "cf", "auc": None}, row | {"model": "cf", "slice": "warm"}]
    report = {"rows": rows, "differences": [{**row, "model": "stage2", "versus": "cf", "auc": 0.1}]}
    assert list_report_metrics(report) == {
        "report/test/stage2/auc": 0.6,
        "report/test/stage2/auc_low": 0.5,
        "report/test/stage2/ndcg-at-10": 0.2,
        "report/test/cf/auc_low": 0.5,
        "report/test/cf/ndcg-at-10": 0.2,
        "report/test/stage2-less-cf/auc": 0.1,
        "report/test/stage2-less-cf/auc_low": 0.5,
        "report/test/stage2-less-cf/ndcg-at-10": 0.2,
    }
