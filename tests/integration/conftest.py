"""Recommenders of the tiny run, for several test files."""

import shutil

import pytest

import collm_dist


@pytest.fixture(scope="module")
def recommender(finished_run):
    """Recommender of the tiny run, on the CPU."""
    return collm_dist.load_recommender(finished_run, device="cpu")


@pytest.fixture
def run_of_stage_1(finished_run, tmp_path):
    """Run directory without stage 2."""
    return shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("stage2", "eval"))


@pytest.fixture
def text_recommender(run_of_stage_1):
    """Recommender of a run without stage 2."""
    return collm_dist.load_recommender(run_of_stage_1, device="cpu", accept_stage1=True)
