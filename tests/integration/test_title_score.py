"""Scores of title likelihoods through both stages, the report, rankings and an export."""

import collections

import numpy as np
import pyarrow.parquet as pq
import pytest

import collm_dist
from collm_dist import RankingRequest
from collm_dist.config.loader import dump_config, load_config
from collm_dist.data.prompts.stage_prompts import build_collator
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.errors import ConfigError
from collm_dist.evaluation.report import run_evaluation
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from collm_dist.tuning.run_stage import run_stage
from tests.conftest import REPOSITORY
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.usefixtures("same_environment")

# Measured: 8e-7. Float32 sums in another order.
TOLERANCE = 1e-5
SETTINGS = [
    "prompt.score=title",
    "prompt.stage1=configs/prompts/stage1_next.txt",
    "prompt.stage2=configs/prompts/stage2_next.txt",
    "stage1.max_steps=3",
    "stage2.max_steps=3",
    "evaluation.bootstrap_samples=20",
]


def load_settings(finished_run, folder, *more):
    base = load_config(finished_run / "config.yaml")
    return load_config(
        REPOSITORY / "configs" / "tiny_cpu.yaml",
        [f"run.dir={folder}", f"dataset.path={base.dataset.path}", f"dataset.items_path={base.dataset.items_path}",
         f"llm.backbone={base.llm.backbone}", *SETTINGS, *more],
    )  # fmt: skip


@pytest.fixture(scope="module")
def titles_run(finished_run, tmp_path_factory):
    """Settings, run directory and report; data and CF steps are the finished run's."""
    folder = tmp_path_factory.mktemp("titles") / "run"
    config, run_dir = load_settings(finished_run, folder), RunDir(folder)
    run_dir.path.mkdir()
    for name in ("data", "cf"):
        run_dir.step_dir(name).symlink_to(finished_run / name, target_is_directory=True)
    (run_dir.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    run_stage(config, run_dir, "stage1")
    run_stage(config, run_dir, "stage2")
    return config, run_dir, run_evaluation(config, run_dir)


def list_scored(run_dir, count):
    """Return requests for rows of the report, and their scores."""
    users = load_user_ids(run_dir.step_dir("data"))
    items = load_item_table(run_dir.step_dir("data"))["item_id"]
    scored = pq.read_table(run_dir.path / "eval" / "scores" / "stage2-test.parquet").slice(0, count).to_pydict()
    log = load_interactions(run_dir.step_dir("data"), ("row_id", "timestamp"))
    times = dict(zip(log["row_id"].tolist(), log["timestamp"].tolist(), strict=True))
    rows = zip(scored["user_idx"], scored["item_idx"], scored["row_id"], strict=True)
    return [RankingRequest(users[user], None, [items[item]], times[row]) for user, item, row in rows], scored["score"]


def test_rankings_have_the_scores_of_the_report_also_after_an_export(titles_run, tmp_path):
    config, run_dir, report = titles_run
    assert {"stage1", "stage2", "slots_shuffled"} <= {row["model"] for row in report["rows"]}
    requests, expected = list_scored(run_dir, 40)
    assert np.std(expected) > 1e-4
    recommender = collm_dist.load_recommender(run_dir.path, device="cpu")
    scores = np.concatenate(recommender.score(requests))
    assert np.abs(scores - np.array(expected)).max() < TOLERANCE
    again = np.concatenate([recommender.score([request])[0] for request in reversed(requests)])[::-1]
    assert np.abs(again - scores).max() < TOLERANCE  # in other batches, with all likelihoods kept
    export_model(config, run_dir, tmp_path / "export", Licences("a", "b", "c"))
    imported = import_model(tmp_path / "export", RunDir(tmp_path / "imported"))
    scored = np.concatenate(collm_dist.load_recommender(imported.path, device="cpu").score(requests))
    np.testing.assert_array_equal(scored, scores)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "how much likelier the history makes the title" in card


def test_a_title_scores_zero_without_a_history_and_a_user(titles_run):
    """What is known of nobody makes no title likelier."""
    recommender = collm_dist.load_recommender(titles_run[1].path, device="cpu")
    ranked = recommender.rank(history=[], candidates=["41", "42", "43"])
    assert max(abs(entry.score) for entry in ranked) < TOLERANCE
    scores = collections.Counter(entry.score for entry in recommender.rank(history=["3"], candidates=["41", "42"]))
    assert len(scores) == 2


def test_a_prompt_without_the_title_is_refused(finished_run):
    config = load_settings(finished_run, finished_run, "prompt.stage2=<ItemTitleList><UserID> and <TargetItemID>. Yes?")
    with pytest.raises(ConfigError, match=r"prompt\.stage2 has no <TargetItemTitle>: add it, or choose another score"):
        build_collator(config, RunDir(finished_run), make_tokenizer(), "stage2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cluster.zero_stage=3"], r"prompt\.score title needs the whole weights"),
        (["llm.activation_checkpointing=true", "lora.dropout=0.1"], r"set lora\.dropout to 0 \(it is 0\.1\)"),
    ],
)
def test_what_does_not_go_together_is_refused(finished_run, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(finished_run, finished_run, *settings)
