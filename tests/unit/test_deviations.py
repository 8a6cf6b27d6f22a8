"""Differences from the paper's recipe."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.data.prompts.prompt_template import TEXTS
from collm_dist.evaluation.deviations import NOT_COMPARED, RECIPES, list_deviations

PAPER_SLOTS = frozenset({"UserID", "TargetItemID"})


def _stage(**settings):
    return {
        "warmup_steps": 200,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "early_stop_patience": 20,
        "max_valid_contexts": 2829,
        "num_epochs": 200,
        **settings,
    }


def _build(**sections):
    return Config.model_validate(
        {
            "run": {"dir": "runs/x"},
            "dataset": {
                "path": "ml-1m",
                "columns": {"label": "label", "split": "split"},
                "split": {"method": "column"},
            },
            "preprocessing": {"ties": "order", "max_history_length": 25},
            "cf": {
                **{"embedding_dim": 256, "learning_rate": 1e-3, "weight_decay": 3.3891},
                **{"num_epochs": 1000, "early_stop_patience": 50},
            },
            "prompt": {
                **{"score": "yes", "max_prompt_tokens": 1024},
                **{stage: f"configs/prompts/question_last/{stage}.txt" for stage in ("stage1", "stage2")},
            },
            "llm": {"backbone": "vicuna-7b", "dtype": "bfloat16"},
            "lora": {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
            "stage1": _stage(eval_every_steps=50),
            "stage2": _stage(eval_every_steps=50),
            "evaluation": {"recipe": "ML-1M"},
            **sections,
        }
    )


def test_the_papers_recipe_deviates_in_the_random_half_of_valid_alone():
    deviations = list_deviations(_build(), PAPER_SLOTS)
    assert [(deviation.setting, deviation.ours) for deviation in deviations] == [
        ("stage1.max_valid_contexts", "2829 contexts"),
        ("stage2.max_valid_contexts", "2829 contexts"),
    ]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_are_shipped_deviate_in_the_random_part_of_valid_alone(path):
    link = Path(__file__).parents[2] / "configs" / path.name
    assert link.samefile(path)
    for file in (path, link):
        settings = [deviation.setting for deviation in list_deviations(load_config(file), PAPER_SLOTS)]
        assert settings == ["stage1.max_valid_contexts", "stage2.max_valid_contexts"]


@pytest.mark.parametrize(
    ("setting", "value", "ours"),
    [
        ("dataset.item_text", '"{title} | {genres}"', "{title} | {genres}"),
        ("dataset.row_filter", "genres != 'Horror'", "genres != 'Horror'"),
        ("dataset.forget", "/data/users.txt", "users.txt"),
        ("preprocessing.max_history_length", "10", "10"),
        ("cf.feedback", "all", "all"),
        ("cf.item_text", "64", "64"),
        ("cf.unknown_item_share", "0.3", "0.3"),
        ("cf.num_epochs", "3", "3"),
        ("cf.init_scale", "0.5", "0.5"),
        ("prompt.stage1", "configs/prompts/stage1.txt", "the text of configs/prompts/stage1.txt"),
        ("prompt.stage2", "Like <TargetItemTitle> <UserID> <TargetItemID>?", "another text"),
        ("prompt.yes", '" yes"', '" yes"'),
        ("prompt.no", '" no"', '" no"'),
        ("prompt.max_prompt_tokens", "512", "512"),
        ("prompt.disliked_length", "5", "5"),
        ("llm.quantization", "4bit", "4bit"),
        ("stage1.num_epochs", "2", "2"),
        ("stage2.num_epochs", "2", "2"),
        ("stage2.guard_metric", "logloss", "logloss"),
    ],
)
def test_each_setting_that_decides_about_results_is_compared(setting, value, ours):
    config = load_config(RECIPES / "paper_ml1m_mf.yaml", [f"{setting}={value}"])
    deviations = {deviation.setting: deviation.ours for deviation in list_deviations(config, PAPER_SLOTS)}
    assert deviations.pop(setting) == ours
    assert set(deviations) == {"stage1.max_valid_contexts", "stage2.max_valid_contexts"}


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=3",
        "dataset.path=elsewhere",
        "preprocessing.num_shards=4",
        "cf.num_layers=5",
        "cf.checkpoint_every_epochs=7",
        "stage1.max_tokens_per_micro_batch=512",
        "evaluation.bootstrap_samples=10",
        "llm.compile=true",
    ],
)
def test_settings_that_are_no_part_of_a_recipe_do_not_deviate(override):
    """Among them the layers of another model than MF, which has none."""
    config = load_config(RECIPES / "paper_ml1m_mf.yaml", [override])
    assert len(list_deviations(config, PAPER_SLOTS)) == 2


def test_a_prompt_of_the_same_text_does_not_deviate(tmp_path):
    copy = tmp_path / "mine.txt"
    copy.write_text((TEXTS / "question_last" / "stage2.txt").read_text())
    config = load_config(RECIPES / "paper_ml1m_mf.yaml", [f"prompt.stage2={copy}"])
    assert len(list_deviations(config, PAPER_SLOTS)) == 2
    copy.write_text("Other <TargetItemTitle> <UserID> <TargetItemID>")
    assert "the text of mine.txt" in {deviation.ours for deviation in list_deviations(config, PAPER_SLOTS)}


def test_settings_that_are_not_compared_exist():
    known = _list_settings(Config)
    assert {
        name for name in NOT_COMPARED if not any(key == name or key.startswith(f"{name}.") for key in known)
    } == set()


def _list_settings(section, prefix=""):
    names = []
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        names += _list_settings(field.annotation, f"{prefix}{name}.") if is_section else [f"{prefix}{name}"]
    return names


def test_each_model_is_compared_with_its_own_recipe():
    config = load_config(RECIPES / "paper_ml1m_mf.yaml", ["cf.model=sasrec"])
    deviations = {deviation.setting: deviation.paper for deviation in list_deviations(config, PAPER_SLOTS)}
    assert deviations["cf.embedding_dim"] == "64"
    assert deviations["cf.history_length"] == "25"
    assert "cf.global_batch_size" not in deviations, "the paper does not say it for SASRec"
    own = load_config(RECIPES / "paper_ml1m_mf.yaml", ["cf.model=package.module:Class", "cf.embedding_dim=3"])
    deviations = {deviation.setting: deviation.paper for deviation in list_deviations(own, PAPER_SLOTS)}
    assert deviations["cf.model"] == "mf, lightgcn, sasrec, din"
    assert "cf.embedding_dim" not in deviations


def test_the_learning_rate_follows_the_backbone_and_the_cosine_ends_in_one_place():
    stage2 = _stage(eval_every_steps=50, learning_rate=1e-2, final_learning_rate_share=0.008)
    qwen = _build(llm={"backbone": "Qwen/Qwen2-1.5B", "dtype": "bfloat16"}, stage2=stage2)
    assert {deviation.setting for deviation in list_deviations(qwen, PAPER_SLOTS)} == {
        "stage1.max_valid_contexts",
        "stage2.max_valid_contexts",
    }
    vicuna = {deviation.setting: deviation for deviation in list_deviations(_build(stage2=stage2), PAPER_SLOTS)}
    assert (vicuna["stage2.learning_rate"].ours, vicuna["stage2.learning_rate"].paper) == ("0.01", "0.001")
    other = list_deviations(_build(stage2=_stage(eval_every_steps=50, learning_rate=1e-2)), PAPER_SLOTS)
    assert "0.08 (ends at 0.0008)" in {deviation.ours for deviation in other}


def test_own_data_and_slots_are_named():
    own = _build(dataset={"path": "logs.csv", "columns": {"label": "liked"}}, lora={"rank": 4})
    deviations = {deviation.setting: deviation for deviation in list_deviations(own, PAPER_SLOTS | {"MatchID"})}
    assert deviations["lora.rank"].ours == "4"
    assert deviations["dataset.split.method"].paper == "calendar"
    assert "MatchID" in deviations["prompt.stage2"].ours
    assert deviations["dataset"].ours == "table"


def test_only_what_follows_the_paper_is_compared_with_it(tmp_path):
    assert list_deviations(_build(lora={"rank": 4}, evaluation={}), PAPER_SLOTS) == []
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        assert (load_config(path).evaluation.recipe is not None) == path.name.startswith("paper_")
    (tmp_path / "mine.yaml").write_text(f"base: {RECIPES}/paper_ml1m_din.yaml\nrun: {{dir: x}}\nlora: {{rank: 4}}\n")
    mine = list_deviations(load_config(tmp_path / "mine.yaml"), PAPER_SLOTS)
    assert ("lora.rank", "4") in {(deviation.setting, deviation.ours) for deviation in mine}


def test_amazon_has_its_own_recipe():
    dataset = {"path": "books", "format": "amazon_2018", "split": {"method": "amazon_book"}}
    book = _build(dataset=dataset, evaluation={"recipe": "Amazon-Book"})
    deviations = {deviation.setting: deviation for deviation in list_deviations(book, PAPER_SLOTS)}
    assert deviations["dataset.like_threshold"].paper == "5"
    assert deviations["dataset.min_user_interactions"].paper == "21"
    assert deviations["stage1.global_batch_size"].paper == "16"
    assert "quarter" in deviations["stage2.max_valid_contexts"].paper
