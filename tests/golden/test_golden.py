"""Two tiny experiments: current results equal the golden records."""

import pytest

from tests.golden.collect import collect_run, fit_cf_models
from tests.golden.commands import show_plans
from tests.golden.messages import collect_messages
from tests.golden.records import check_record


def test_explicit_feedback(finished_run):
    check_record("explicit", collect_run(finished_run))


def test_implicit_feedback(finished_clicks_run):
    check_record("implicit", collect_run(finished_clicks_run))


def test_dry_runs(finished_run, finished_clicks_run):
    found = {"explicit": show_plans(finished_run), "implicit": show_plans(finished_clicks_run)}
    check_record("plans", found)


def test_messages(finished_run, tmp_path):
    check_record("messages", collect_messages(finished_run, tmp_path))


@pytest.mark.slow
def test_collaborative_models(finished_run, tmp_path):
    check_record("cf_models", fit_cf_models(finished_run, tmp_path))
