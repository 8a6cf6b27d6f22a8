"""The experiments in configs/."""

from pathlib import Path

import pytest

from collm_dist.config import Config
from collm_dist.config.loader import list_fields, load_config
from collm_dist.config.reference import render_reference
from collm_dist.data.prompts.prompt_template import PromptTemplate, load_prompt_text

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PROMISED = {
    "ml100k_demo", "ml1m_official", "own_clicks", "own_ratings", "paper_amazon_book_mf", "paper_ml1m_mf", "tiny_cpu",
}  # fmt: skip
ANCHORED = {"ml100k_demo", "own_clicks", "own_ratings"}  # the paper has no anchor
MAX_OWN_SETTINGS = {"own_ratings": 7, "own_clicks": 7}


def test_promised_experiments_exist():
    assert {path.stem for path in CONFIGS} >= PROMISED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_experiment_loads_and_its_prompts_parse(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert Path(config.run.dir).parts[0] == "runs"
    PromptTemplate.parse(load_prompt_text(config.prompt.stage1), allow_slots=False)
    PromptTemplate.parse(load_prompt_text(config.prompt.stage2), allow_slots=True)
    assert path.read_text(encoding="utf-8").startswith("# "), "the first comment names the experiment"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_own_data_and_the_demo_have_an_anchor(path):
    assert load_config(path).anchor.kind == ("blend" if path.stem in ANCHORED else None)


def test_warm_up_of_the_demo_is_at_most_a_tenth():
    config = load_config(ROOT / "configs" / "ml100k_demo.yaml")
    for stage in (config.stage1, config.stage2):
        assert stage.max_steps == 40
        assert stage.warmup_steps <= stage.max_steps / 10


@pytest.mark.parametrize("name", ["own_ratings", "own_clicks"])
def test_own_data_needs_few_settings(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    given = [path for path, _ in list_fields(Config) if _is_given(config, path)]
    assert len(given) <= MAX_OWN_SETTINGS[name], given


def _is_given(config, path):
    *sections, last = path.split(".")
    for section in sections:
        config = getattr(config, section)
    return last in config.model_fields_set


def test_every_setting_is_described():
    for name, field in list_fields(Config):
        assert field.description, name
        assert field.description.endswith("."), name


def test_the_reference_is_current():
    written = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert written == render_reference(ROOT / "configs"), "run: make reference"
