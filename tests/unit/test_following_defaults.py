"""Defaults that follow from other settings: of a loaded file, of changed settings, and of a run's config.yaml."""

import json

import pytest

from collm_dist.config.loader import change_settings, dump_config, get_setting, load_config
from collm_dist.errors import ConfigError
from collm_dist.runs.fingerprints import flatten_config

GOOD = "run: {dir: runs/x}\ndataset: {path: a.csv, columns: {rating: stars}}\n"


def load(folder, settings=(), text=GOOD):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(settings))


@pytest.mark.parametrize(
    ("given", "changes", "expected"),
    [
        ({}, {"lora.rank": "full"}, {"stage1.learning_rate": 1e-4}),
        ({"stage1.learning_rate": 3e-4}, {"lora.rank": "full"}, {"stage1.learning_rate": 3e-4}),
        (
            {"anchor.kind": "as_of"},
            {"anchor.kind": None},
            {"stage1.llm_loss_weight": None, "anchor.recent_share": None},
        ),
        ({}, {"anchor.kind": "as_of"}, {"stage2.llm_loss_weight": 1.0, "anchor.recent_share": 0.5}),
        ({"anchor.kind": "as_of"}, {"prompt.score": "title"}, {"stage1.llm_loss_weight": None}),
        (
            {"dataset.feedback": "implicit", "dataset.columns.rating": None},
            {"evaluation.cutoffs": [1, 3, 5]},
            {"stage1.select_metric": "ndcg@3", "promotion.metric": "ndcg@3"},
        ),
        ({}, {"stage1.learning_rate": 5e-4}, {"stage1.learning_rate": 5e-4}),
    ],
)
def test_a_default_follows_other_settings_in_a_dumped_config_too(tmp_path, given, changes, expected):
    config = change_settings(load(tmp_path), given)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    overrides = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    for changed in (load_config(path, overrides), change_settings(config, changes)):
        assert {name: get_setting(changed, name) for name in expected} == expected
        assert flatten_config(load_config(path)) == flatten_config(config)


def test_with_an_anchor_the_language_model_has_a_loss_of_its_own(tmp_path):
    def get_weights(*settings):
        config = load(tmp_path, settings)
        return config.stage1.llm_loss_weight, config.stage2.llm_loss_weight

    anchor, title = "anchor.kind=as_of", "prompt.score=title"
    assert get_weights() == (None, None)
    assert get_weights(anchor) == (1, 1)
    assert get_weights(anchor, "stage1.llm_loss_weight=null", "stage2.llm_loss_weight=0.5") == (None, 0.5)
    # No value of a title's likelihood separates likes from dislikes, so only comparisons of targets count, if any.
    assert get_weights(anchor, title) == (None, None)
    assert get_weights(anchor, title, "stage2.pairwise_weight=0.5") == (None, 1)
    saved = dump_config(load(tmp_path, [anchor, "stage1.llm_loss_weight=null"]))
    assert load(tmp_path, text=saved).stage1.llm_loss_weight is None


def test_all_weights_have_a_lower_default_rate_and_no_quantization(tmp_path):
    full = load(tmp_path, ["lora.rank=full"])
    assert full.stage1.learning_rate == 1e-4
    assert load(tmp_path, text=dump_config(full)) == full
    assert load(tmp_path, ["lora.rank=8"]).stage1.learning_rate == 2e-4
    assert load(tmp_path, ["lora.rank=full", "stage1.learning_rate=3e-5"]).stage1.learning_rate == 3e-5
    quantized = ["lora.rank=full", "llm.quantization=4bit"]
    with pytest.raises(ConfigError, match=r"lora\.rank full trains the weights .*llm\.quantization to none"):
        load(tmp_path, quantized)
    assert load(tmp_path, [*quantized, "stage1.enabled=false"]).lora.rank == "full"


def test_with_implicit_feedback_the_default_metric_is_what_the_report_ranks_by(tmp_path):
    def get_metrics(*settings):
        config = load(tmp_path, settings)
        return config.stage1.select_metric, config.stage2.select_metric, config.promotion.metric

    assert get_metrics() == ("auc",) * 3
    assert get_metrics("dataset.feedback=implicit") == ("ndcg@10",) * 3
    assert get_metrics("dataset.feedback=implicit", "evaluation.cutoffs=[1, 3]") == ("ndcg@3",) * 3
    assert get_metrics("dataset.feedback=implicit", "evaluation.cutoffs=[]") == ("auc",) * 3
    given = ("stage1.select_metric=auc", "stage2.select_metric=uauc", "promotion.metric=hr@5")
    assert get_metrics("dataset.feedback=implicit", *given) == ("auc", "uauc", "hr@5")
