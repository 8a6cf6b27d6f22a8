"""Which settings differ from the paper's recipe (CoLLM, arXiv 2310.19488, and its official code)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from collm_dist.config import Config

Recipe = Literal["ML-1M", "Amazon-Book"]


@dataclass(frozen=True)
class Deviation:
    """A setting that is not the paper's: its dotted path, our value and the paper's, in words where need be."""

    setting: str
    ours: str
    paper: str


# setting: (on ML-1M, on Amazon-Book). These the authors' ready split has already gone through.
_RAW_DATA_RECIPE: dict[str, tuple[Any, Any]] = {
    "dataset.like_threshold": (4.0, 5.0),
    "dataset.duplicates": ("keep", "keep"),
    "dataset.min_user_interactions": (0, 21),
    "dataset.min_item_interactions": (0, 21),
    "dataset.max_user_interactions": (None, None),
    "dataset.max_item_interactions": (None, None),
}
# Of each collaborative model: the authors' L2 coefficients times the training rows, see ``cf.weight_decay``.
_CF_RECIPES: dict[str, dict[str, tuple[Any, Any]]] = {
    "mf": {
        "cf.embedding_dim": (256, 256),
        "cf.learning_rate": (1e-3, 1e-3),
        "cf.weight_decay": (3.3891, 0.727463),
        "cf.global_batch_size": (2048, 10240),
    },
    "lightgcn": {
        "cf.embedding_dim": (64, 256),
        "cf.learning_rate": (1e-2, 1e-4),
        "cf.weight_decay": (3.3891, 0.0727463),
        "cf.num_layers": (2, 2),
    },
    "sasrec": {
        "cf.embedding_dim": (64, 64),
        "cf.learning_rate": (1e-2, 1e-3),
        "cf.weight_decay": (338.91, 727.463),
        "cf.history_length": (25, 20),
        "cf.num_layers": (2, 2),
        "cf.num_heads": (1, 1),
        "cf.dropout": (0.2, 0.2),
    },
    "din": {
        "cf.learning_rate": (1e-4, 1e-4),
        "cf.weight_decay": (3.3891, 7274.63),
        "cf.dropout": (0.2, 0.8),
        "cf.hidden_sizes": ((200, 80), (256, 128, 64)),
    },
}
_RECIPE: dict[str, tuple[Any, Any]] = {
    "dataset.feedback": ("explicit", "explicit"),
    "preprocessing.ties": ("order", "order"),
    "cf.select_metric": ("auc", "auc"),
    "cf.cross_fit": ("off", "off"),
    "prompt.score": ("yes", "yes"),
    "prompt.history_length": (10, 10),
    "lora.rank": (8, 8),
    "lora.alpha": (16, 16),
    "lora.dropout": (0.05, 0.05),
    "lora.target_modules": (("q_proj", "v_proj"), ("q_proj", "v_proj")),
    "mapping.hidden_multiple": (10, 10),
    "mapping.tokens_per_slot": (1, 1),
    "mapping.mask_probability": (0.0, 0.0),
    "stage1.enabled": (True, True),
    "stage1.learning_rate": (1e-3, 1e-4),
    "stage2.train_cf": (False, False),
    "evaluation.max_users": (None, None),
}
_STAGE_RECIPE: dict[str, tuple[Any, Any]] = {
    "global_batch_size": (32, 16),
    "warmup_steps": (200, 200),
    "weight_decay": (1e-3, 1e-3),
    "adam_betas": ((0.9, 0.999), (0.9, 0.999)),
    "max_grad_norm": (0.0, 0.0),
    "max_steps": (None, None),
    "max_train_contexts": (None, None),
    "eval_every_steps": (50, 100),
    "early_stop_patience": (20, 20),
    "select_metric": ("auc", "auc"),
}
_FINAL_LEARNING_RATE = 8e-5
_STAGE2_LEARNING_RATES = {"vicuna-7b": (1e-3, 1e-2), "qwen2-1.5b": (1e-2, 1e-2)}
_SPLITS = {"ML-1M": "calendar", "Amazon-Book": "amazon_book"}
_MONTHS = {"train_months": (14, 23), "valid_months": (24, 28), "test_months": (29, 33)}


def choose_recipe(config: Config) -> Recipe:
    """Return the data set of the paper whose settings a config is compared with."""
    is_book = config.dataset.split.method == "amazon_book" or config.dataset.format.startswith("amazon")
    return "Amazon-Book" if is_book else "ML-1M"


def list_deviations(config: Config, stage2_slots: frozenset[str] = frozenset()) -> list[Deviation]:
    """Return every setting that differs from the paper's recipe, in the order of the config.

    Args:
        config: the experiment.
        stage2_slots: names of the slots in the prompt of stage 2, such as ``MatchID``.
    """
    recipe = choose_recipe(config)
    column = 0 if recipe == "ML-1M" else 1
    is_ready = config.dataset.format == "collm" or config.dataset.split.method == "column"
    settings = _RECIPE if is_ready else _RAW_DATA_RECIPE | _RECIPE
    settings = settings | _CF_RECIPES.get(config.cf.model, {})
    wanted = {name: values[column] for name, values in settings.items()}
    for section in ("stage1", "stage2"):
        wanted.update({f"{section}.{name}": values[column] for name, values in _STAGE_RECIPE.items()})
    backbone = _find_backbone(config.llm.backbone)
    learning_rates = _STAGE2_LEARNING_RATES[backbone or "vicuna-7b"]
    wanted["stage2.learning_rate"] = learning_rates[column]

    found = _compare_data(config, recipe)
    if backbone is None:
        found.append(Deviation("llm.backbone", config.llm.backbone, "vicuna-7b or qwen2-1.5b"))
    if config.cf.model not in _CF_RECIPES:
        found.append(Deviation("cf.model", config.cf.model, ", ".join(_CF_RECIPES)))
    for setting, paper in wanted.items():
        value: Any = reduce(getattr, setting.split("."), config)
        if not _is_equal(value, paper):
            found.append(Deviation(setting, _format(value), _format(paper)))
    for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
        final = stage.learning_rate * stage.final_learning_rate_share
        if not math.isclose(final, _FINAL_LEARNING_RATE, rel_tol=1e-6):
            ours = f"{stage.final_learning_rate_share:g} (ends at {final:g})"
            found.append(Deviation(f"{name}.final_learning_rate_share", ours, f"ends at {_FINAL_LEARNING_RATE:g}"))
        ours = "all of valid" if stage.max_valid_contexts is None else f"{stage.max_valid_contexts} contexts"
        share = "half" if recipe == "ML-1M" else "quarter"
        found.append(Deviation(f"{name}.max_valid_contexts", ours, f"a random {share} of valid"))
    extra = sorted(stage2_slots - {"UserID", "TargetItemID"})
    if extra:
        found.append(Deviation("prompt.stage2", f"also slots {', '.join(extra)}", "slots UserID and TargetItemID"))
    sections = list(type(config).model_fields)
    return sorted(found, key=lambda deviation: sections.index(deviation.setting.split(".")[0]))


def _compare_data(config: Config, recipe: Recipe) -> list[Deviation]:
    """Compare the data set and its split; a ready split is taken for the authors' own."""
    data = config.dataset
    found = []
    if data.format == "collm" or data.split.method == "column":
        return []
    if data.format not in ("movielens_1m", "amazon_2018"):
        found.append(Deviation("dataset", _format(data.asset or data.format), f"{recipe} as the authors prepared it"))
    if data.split.method != _SPLITS[recipe]:
        found.append(Deviation("dataset.split.method", data.split.method, _SPLITS[recipe]))
    elif data.split.method == "calendar":
        for name, months in _MONTHS.items():
            if getattr(data.split, name) != months:
                ours = _format(getattr(data.split, name))
                found.append(Deviation(f"dataset.split.{name}", ours, _format(months)))
    return found


def _find_backbone(name: str) -> str | None:
    """Return which of the paper's two backbones this is, None if neither."""
    plain = name.lower().rsplit("/", 1)[-1]
    if plain.startswith("vicuna-7b"):
        return "vicuna-7b"
    return "qwen2-1.5b" if plain == "qwen2-1.5b" else None


def _is_equal(ours: Any, paper: Any) -> bool:
    if isinstance(ours, float) and isinstance(paper, float):
        return math.isclose(ours, paper, rel_tol=1e-9)
    return bool(ours == paper)


def _format(value: Any) -> str:
    """Say a value as a YAML file would, None as none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_format(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
