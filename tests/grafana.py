"""The Grafana dashboard of docs/, as data, and the metrics that its queries name."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.conftest import REPOSITORY

_METRIC = re.compile(r"\b(?:ray|collm)_\w+")


def read_dashboard() -> dict[str, Any]:
    return json.loads((REPOSITORY / "docs" / "grafana_dashboard.json").read_text(encoding="utf-8"))


def list_queries() -> list[str]:
    return [target["expr"] for panel in read_dashboard()["panels"] for target in panel.get("targets", [])]


def list_metrics() -> set[str]:
    """Return the names of the metrics; every selector names one, so other words are functions and labels."""
    return {name for query in list_queries() for name in _METRIC.findall(query)}
