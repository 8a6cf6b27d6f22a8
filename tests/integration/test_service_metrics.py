"""Metrics of a running service, as Prometheus reads them: all that the Grafana dashboard shows of a service."""

import re
import shutil
import time
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from collm_dist.runs.promotion import move_pointer
from tests.grafana import list_metrics, read_dashboard
from tests.integration.ranking_service import serving


def read_metrics(port):
    """Return the samples of a service by name."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


@pytest.mark.slow
def test_the_dashboard_shows_what_a_service_exports(finished_run, tmp_path):
    """After rankings, events, errors, and a promotion. The second run is the first one under another name."""
    for name in ("one", "two"):
        shutil.copytree(finished_run, tmp_path / name)
    move_pointer(tmp_path / "current", tmp_path / "one")
    options = [f"run.dir={tmp_path / 'current'}", "--events", str(tmp_path / "events"), "--follow-every-s", "1"]
    with serving(tmp_path / "one", *options) as service:
        first = {"event_id": "1", "user": "7", "item": "no such item", "time": 1_020_000_000, "label": "like"}
        for event in (first, first, first | {"event_id": "2", "item": "3"}):
            assert service.ask({"events": [event]}, path="/events")[0] == 200
        assert service.ask({"user": "7", "top_k": 3})[0] == 200
        assert service.ask({"user": "7", "candidates": ["nothing"]})[0] == 422
        move_pointer(tmp_path / "current", tmp_path / "two")
        wanted = {name for name in list_metrics() if name.startswith("ray_")}
        deadline, samples = time.monotonic() + 180, {}
        while not wanted <= samples.keys() and time.monotonic() < deadline:
            time.sleep(2)
            samples = read_metrics(service.metrics_port)
        assert wanted <= samples.keys(), sorted(wanted - samples.keys())
        served = {sample.labels["run"]: sample.value for sample in samples["ray_collm_served_run"]}
        assert served == {"one": 0, "two": 1}
        for name, value in (("stored", 2), ("duplicates", 1), ("unknown_items", 2)):
            assert sum(sample.value for sample in samples[f"ray_collm_events_{name}_total"]) == value
    for panel in read_dashboard()["panels"]:
        for target in panel.get("targets", []):
            names = re.findall(r"\bray_\w+", target["expr"])
            labels = set().union(*(sample.labels for name in names for sample in samples[name]))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels or not names, target["expr"]
