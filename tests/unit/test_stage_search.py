"""Search spaces of a stage: what is refused before any work, and the config's own settings."""

import pytest

from collm_dist.config.loader import load_config
from collm_dist.errors import ConfigError
from collm_dist.orchestration.stage_search import plan_search
from collm_dist.orchestration.stage_study import TrialConfigs, open_study
from collm_dist.runs.run_dir import RunDir


@pytest.fixture
def plan(repository, tmp_path):
    """Return a function that checks a space."""

    def check(stage, space, *overrides):
        settings = [f"run.dir={tmp_path}", f"stage_search.space={space}", *overrides]
        return plan_search(load_config(repository / "configs" / "tiny_cpu.yaml", settings), RunDir(tmp_path), stage)

    return check


@pytest.mark.parametrize(
    ("stage", "space"),
    [
        ("stage1", "{stage1.learning_rate: {log_uniform: [1e-4, 1e-2]}, lora.rank: {integer: [2, 8]}}"),
        ("stage1", "{stage1.max_train_contexts: {choice: [null, 50]}, lora.dropout: {uniform: [0, 0.5]}}"),
        ("stage1", "{prompt.stage1: {choice: [Like <TargetItemTitle>?, Buy <TargetItemTitle>?]}}"),
        ("stage2", "{mapping.tokens_per_slot: {choice: [1, 2]}, stage2.adam_betas: {choice: [[0.9, 0.99]]}}"),
    ],
)
def test_settings_that_a_stage_trains_with_are_searched(plan, stage, space):
    assert plan(stage, space).space


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("stage1", "stage2.learning_rate: {log_uniform: [1e-4, 1e-2]}"),
        ("stage1", "evaluation.bootstrap_samples: {choice: [100, 200]}"),
        ("stage1", "run.dir: {choice: [a, b]}"),
        ("stage1", "stage1.max_tokens_per_micro_batch: {integer: [1024, 4096]}"),
        ("stage1", "mapping.tokens_per_slot: {choice: [1, 2]}"),
        ("stage1", "prompt.stage2: {choice: [Like <TargetItemTitle>?, Buy <TargetItemTitle>?]}"),
        ("stage2", "stage2.train_cf: {choice: [false]}"),
    ],
)
def test_settings_that_change_nothing_are_refused(plan, stage, name):
    setting = name.split(":")[0]
    with pytest.raises(ConfigError, match=rf"space\.{setting}: .* changes no result of {stage}.*search a setting that"):
        plan(stage, f"{{{name}}}", "stage1.max_tokens_per_micro_batch=auto")


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        ("stage1", "stage1.select_metric: {choice: [auc, uauc]}", "trials are compared by it; set it for the whole"),
        ("stage1", "stage1.guard_metric: {choice: [null, logloss]}", "compared under the same guard"),
        ("stage2", "stage2.guard_margin: {uniform: [0.1, 0.2]}", "compared under the same guard"),
        ("stage1", "stage1.max_valid_contexts: {choice: [null, 20]}", "compared on the same validation rows"),
        ("stage1", "stage1.enabled: {choice: [true, false]}", "trials train the stage"),
        ("stage1", "cf.embedding_dim: {choice: [4, 8]}", "the step 'cf', .*search it with launch/search.py --step cf"),
        ("stage2", "lora.rank: {choice: [3, 5]}", "the step 'stage1', .*search it with launch/search.py --step stage1"),
        ("stage1", "run.seed: {choice: [1, 2]}", "the step 'data', .*compare runs instead"),
    ],
)
def test_settings_that_trials_share_are_refused(plan, stage, name, message):
    setting = name.split(":")[0]
    with pytest.raises(ConfigError, match=rf"space\.{setting}: changes .*{message}"):
        plan(stage, f"{{{name}}}", "stage2.guard_metric=logloss")


def test_a_stage_that_is_left_out_is_not_searched(plan):
    with pytest.raises(ConfigError, match=r"stage1\.enabled is false, so there is nothing to search"):
        plan("stage1", "{stage1.learning_rate: {log_uniform: [1e-4, 1e-2]}}", "stage1.enabled=false")


@pytest.mark.parametrize("kind", ["uniform", "log_uniform"])
def test_fractions_of_whole_numbers_are_refused(plan, kind):
    with pytest.raises(ConfigError, match=rf"space\.lora\.rank\.{kind}: .*valid integer.*integer: \[4, 16\]"):
        plan("stage1", f"{{lora.rank: {{{kind}: [4, 16]}}}}")


def test_own_settings_that_are_not_numbers_are_outside_a_domain_of_numbers(repository, tmp_path):
    config = load_config(
        repository / "configs" / "tiny_cpu.yaml", [f"run.dir={tmp_path}", "stage1.max_tokens_per_micro_batch=auto"]
    )
    space = {"stage1.max_tokens_per_micro_batch": {"integer": (1024, 4096)}}
    assert open_study(TrialConfigs(config, space), tmp_path).trials == []
