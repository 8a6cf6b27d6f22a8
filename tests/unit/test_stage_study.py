"""Study of a search for stage settings: draws of new and of resumed searches."""

import optuna
import pytest

from collm_dist.config.loader import load_config
from collm_dist.orchestration.stage_study import TrialConfigs, build_distribution, open_study

SPACE = {"stage1.learning_rate": {"log_uniform": (3e-5, 3e-3)}, "lora.rank": {"choice": [2, 4, 8]}}


@pytest.fixture
def draw(repository, tmp_path):
    """Return a function that opens the study, as a start of the search does, and returns the settings of new trials."""
    config = load_config(repository / "configs" / "tiny_cpu.yaml", ["run.seed=7"])

    def run(num_trials, seed=7, folder="study", last_ends=True):
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        study = open_study(TrialConfigs(settings, SPACE), tmp_path / folder)
        drawn = []
        for index in range(num_trials):
            trial = study.ask({name: build_distribution(form) for name, form in SPACE.items()})
            drawn.append(trial.params)
            if last_ends or index < num_trials - 1:
                study.tell(trial, 0.5)
        return drawn

    return run


def test_a_new_search_draws_the_stream_of_its_seed(draw):
    sampler = optuna.samplers.TPESampler(seed=7, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {name: build_distribution(form) for name, form in SPACE.items()}
    drawn = draw(4)
    assert drawn == [study.ask(distributions).params for _ in range(4)]
    assert drawn != draw(4, seed=8, folder="other")


def test_a_resumed_search_draws_other_settings(draw):
    drawn = [settings for _ in range(3) for settings in draw(4)]
    assert len({settings["stage1.learning_rate"] for settings in drawn}) == len(drawn)


def test_a_search_killed_at_the_same_trial_resumes_with_the_same_draws(draw):
    resumed = []
    for folder in ("a", "b"):
        draw(3, folder=folder)
        resumed.append(draw(3, folder=folder))
    assert resumed[0] == resumed[1]


def test_a_trial_that_ran_is_queued_again_with_its_settings(draw):
    *_, last = draw(3, last_ends=False)
    first, second = draw(2)
    assert first == last
    assert second["stage1.learning_rate"] != first["stage1.learning_rate"]
