"""Search space: validation and draws."""

import math

import pytest
import yaml

from collm_dist.cf.search_space import apply_settings, draw_settings
from collm_dist.config import CfConfig, CfSearchConfig, Config
from collm_dist.config.loader import load_config
from collm_dist.errors import ConfigError
from collm_dist.orchestration.cf_search import describe_search

SPACE = {
    "learning_rate": {"log_uniform": [1e-4, 1e-1]},
    "dropout": {"uniform": [0.2, 0.4]},
    "num_layers": {"integer": [1, 3]},
    "hidden_sizes": {"choice": [[20, 8], [40, 16]]},
}


def make_config(space=SPACE, num_trials=200, seed=0, *, cf=None, **sections):
    return Config.model_validate(
        {
            "run": {"dir": "runs/x", "seed": seed},
            "dataset": {"path": "ratings.csv", "columns": {"rating": "rating"}},
            "cf": cf or {},
            "cf_search": {"space": space, "num_trials": num_trials},
            **sections,
        }
    )


def draw(space=SPACE, num_trials=200, seed=0, **cf):
    return draw_settings(make_config(space, num_trials, seed, cf=cf))


def test_the_first_trial_is_the_config_itself():
    first = draw(learning_rate=0.5, dropout=0.9)[0]
    assert first == {"learning_rate": 0.5, "dropout": 0.9, "num_layers": 2, "hidden_sizes": (200, 80)}


def test_draws_fill_their_ranges():
    trials = draw()[1:]
    rates = [math.log10(trial["learning_rate"]) for trial in trials]
    assert -4 <= min(rates) < -3.9
    assert -1.1 < max(rates) <= -1
    assert 0.4 < sum(rate < -2.5 for rate in rates) / len(rates) < 0.6  # even in the logarithm
    assert all(0.2 <= trial["dropout"] <= 0.4 for trial in trials)
    assert {trial["num_layers"] for trial in trials} == {1, 2, 3}
    assert {tuple(trial["hidden_sizes"]) for trial in trials} == {(20, 8), (40, 16)}


def test_the_seed_decides():
    assert draw(seed=3) == draw(seed=3) != draw(seed=4)


def test_settings_replace_those_of_the_section():
    config = make_config(cf={"embedding_dim": 8})
    changed = apply_settings(config, {"hidden_sizes": [40, 16], "dropout": 0.25})
    assert changed.cf == CfConfig(embedding_dim=8, hidden_sizes=(40, 16), dropout=0.25)
    assert changed.model_copy(update={"cf": config.cf}) == config


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"lerning_rate": {"choice": [1]}},
            r"lerning_rate is not a setting of the cf section; did you mean learning_rate\?",
        ),
        ({"seeds": {"choice": [[1], [2]]}}, "seeds: a search would pick a lucky seed"),
        ({"dropout": {"uniform": [0.1, 0.3], "choice": [0.2]}}, "dropout: takes one of choice, .* found 2"),
        ({"dropout": {"uniform": [0.3, 0.1]}}, "dropout: uniform needs low < high"),
        ({"dropout": {"uniform": [0.3]}}, r"dropout: uniform takes two numbers, \[low, high\]"),
        ({"weight_decay": {"log_uniform": [0, 1]}}, "weight_decay: log_uniform needs 0 < low < high"),
        ({"num_layers": {"integer": [1, 2.5]}}, "num_layers: integer takes two whole numbers"),
        ({"num_layers": {"choice": []}}, "num_layers: choice is empty"),
        ({}, "is empty"),
        ({"dropout": {"loguniform": [0.1, 0.2]}}, r"cf_search\.space\.dropout\.loguniform"),
    ],
)
def test_a_wrong_space_is_a_mistake_in_the_config(tmp_path, space, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": "r"}, "dataset": {"path": "a.csv"}, "cf_search": {"space": space}}))
    with pytest.raises(ConfigError, match=r"cf_search\.space.*") as caught:
        load_config(path)
    assert caught.match(message)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"dropout": {"uniform": [0.5, 1.5]}}, r"cf_search\.space\.dropout\.uniform: should be less than 1 \(1\.5\)"),
        ({"embedding_dim": {"choice": [8, "x"]}}, r"cf_search\.space\.embedding_dim\.choice: .*valid integer.*'x'"),
    ],
)
def test_an_invalid_value_is_refused(space, message):
    with pytest.raises(ConfigError, match=message):
        draw(space, num_trials=2)


def test_invalid_combinations_are_refused():
    space = {"num_heads": {"choice": [3]}, "embedding_dim": {"choice": [8, 9]}}
    with pytest.raises(ConfigError, match=r"trial \d+ \(num_heads=3 embedding_dim=8\): cf\.num_heads 3 does not"):
        draw(space, model="sasrec")


@pytest.mark.parametrize(
    ("space", "sections", "message"),
    [
        (
            {"history_length": {"choice": [4, 400]}},
            {"preprocessing": {"max_history_length": 8}, "prompt": {"history_length": 8}},
            r"trial \d+ \(history_length=400\): cf\.history_length 400 exceeds preprocessing\.max_history_length 8, "
            "the longest history in the shards: raise the latter; or search other values",
        ),
        (
            {"model": {"choice": ["mf", "lightgcn"]}},
            {"stage2": {"train_cf": True}},
            r"trial \d+ \(model=lightgcn\): stage2\.train_cf .* set .*cf\.model to mf",
        ),
        (
            {"model": {"choice": ["mf", "none"]}},
            {},
            r"space\.model\.choice: cf\.model 'none' is not trained; leave it out",
        ),
        (
            {"model": {"choice": ["mf", "none"]}},
            {"stage2": {"train_cf": "scratch"}},
            r"space\.model\.choice: cf\.model 'none' is not trained; leave it out",
        ),
        (
            {"item_text": {"choice": [8]}, "model": {"choice": ["mf", "table"]}},
            {"cf": {"item_vectors": "x.parquet"}},
            r"trial \d+ \(item_text=8 model=table\): cf\.item_text 8 needs a model that learns item vectors",
        ),
    ],
)
def test_trials_are_checked_as_whole_configurations(space, sections, message):
    """Before any work: the best trial is a configuration that the next command accepts."""
    with pytest.raises(ConfigError, match=message):
        describe_search(make_config(space, num_trials=20, **sections))


def test_an_unknown_name_without_near_match():
    with pytest.raises(ValueError, match="xyzzy is not a setting of the cf section"):
        CfSearchConfig(space={"xyzzy": {"uniform": (0.0, 1.0)}})
