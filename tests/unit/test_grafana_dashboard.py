"""The Grafana dashboard: its structure, and its queries of training runs against the gauges that runs write."""

import json
import re
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from collm_dist.monitoring import StateTextfile, TrainingTextfile, tags
from collm_dist.runs.run_dir import STEPS
from tests.conftest import REPOSITORY
from tests.grafana import list_metrics, list_queries, read_dashboard


def test_panels_have_unique_ids_and_do_not_overlap():
    dashboard = read_dashboard()
    panels = dashboard["panels"]
    assert max(Counter(panel["id"] for panel in panels).values()) == 1
    cells = Counter()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            cells.update((x, y) for y in range(place["y"], place["y"] + place["h"]))
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"]
            assert panel["targets"]
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs)
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert max(cells.values()) == 1
    assert {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]} == {
        "datasource": "datasource",
        "run": "query",
    }
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used == {"datasource", "run", "__rate_interval"}


def test_queries_are_promql():
    promql_parser = pytest.importorskip("promql_parser")
    for query in list_queries():
        promql_parser.parse(query.replace("$__rate_interval", "5m").replace("$run", ".*"))


def test_metrics_of_runs_are_those_that_runs_write(tmp_path):
    logged = [value for name, value in vars(tags).items() if name.isupper() and isinstance(value, str)]
    with_cutoff = [f"{tag}@10" if tag in (tags.VALID_NDCG, tags.VALID_HR) else tag for tag in logged]
    TrainingTextfile(tmp_path, run="r", step="cf", total_steps=1).update(1, dict.fromkeys(with_cutoff, 1.0))
    status = {"state": "failed", "step": "cf", "restarts": 0, "exit_code": 1}
    times = dict.fromkeys(("started_at", "heartbeat_at"), "2026-01-01T00:00:00+00:00")
    StateTextfile(tmp_path, run="r", steps=STEPS).update(status | times)
    written = {
        sample.name: set(sample.labels)
        for path in tmp_path.iterdir()
        for family in text_string_to_metric_families(path.read_text(encoding="utf-8"))
        for sample in family.samples
    }
    used = {name for name in list_metrics() if name.startswith("collm_")}
    assert {"collm_training_loss", "collm_training_samples_per_second", "collm_memory_peak_bytes"} <= used
    assert used <= set(written), used - set(written)
    variable = read_dashboard()["templating"]["list"][1]["definition"]
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable).groups()
    assert label in written[name]
    for panel in read_dashboard()["panels"]:  # labels of legends
        for target in panel.get("targets", []):
            names = re.findall(r"\bcollm_\w+", target["expr"])
            for legend_label in re.findall(r"{{(\w+)}}", target["legendFormat"]) if names else []:
                assert legend_label in written[names[0]], (names[0], legend_label)


def test_the_page_about_monitoring_links_to_it():
    assert "(grafana_dashboard.json)" in (REPOSITORY / "docs" / "monitoring.md").read_text(encoding="utf-8")
