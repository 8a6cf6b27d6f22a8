"""Differences between an experiment and the paper's recipe (CoLLM, arXiv 2310.19488, and its official code)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from collm_dist.assets import BACKBONES
from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.config.yaml_file import read_yaml
from collm_dist.runs.local_paths import shorten_path

Recipe = Literal["ML-1M", "Amazon-Book"]

RECIPES = Path(__file__).parent / "recipes"
_FILE_NAMES: dict[Recipe, str] = {"ML-1M": "paper_ml1m_{}.yaml", "Amazon-Book": "paper_amazon_book_{}.yaml"}
_VALID_SHARES: dict[Recipe, str] = {"ML-1M": "half", "Amazon-Book": "quarter"}
_PAPER_CF_MODELS = ("mf", "lightgcn", "sasrec", "din")

# The authors' ready split has gone through these already.
_RAW_DATA_SETTINGS = (
    "dataset.like_threshold", "dataset.duplicates", "dataset.min_user_interactions", "dataset.min_item_interactions",
    "dataset.max_user_interactions", "dataset.max_item_interactions",
)  # fmt: skip
_SETTINGS = (
    "dataset.feedback", "preprocessing.ties", "cf.select_metric", "cf.cross_fit", "prompt.score",
    "anchor.kind", "prompt.history_length", "lora.rank", "lora.alpha", "lora.dropout", "lora.target_modules",
    "mapping.hidden_multiple", "mapping.tokens_per_slot", "mapping.mask_probability", "stage1.enabled",
    "stage1.learning_rate", "stage2.train_cf", "evaluation.max_users", "evaluation.max_contexts",
)  # fmt: skip
_STAGE_SETTINGS = (
    "global_batch_size", "warmup_steps", "weight_decay", "adam_betas", "max_grad_norm", "max_steps",
    "max_train_contexts", "eval_every_steps", "early_stop_patience", "select_metric",
    "pairwise_weight", "listwise_weight", "llm_loss_weight", "guard_metric",
)  # fmt: skip
# CF settings of a recipe file that are compared for every model, or limit the cost alone.
_COMMON_CF_SETTINGS = {"model", "select_metric", "cross_fit", "num_epochs", "early_stop_patience"}


@dataclass(frozen=True)
class Deviation:
    """A setting that differs from the paper's: its dotted name, our value and the paper's."""

    setting: str
    ours: str
    paper: str


def list_deviations(config: Config, stage2_slots: frozenset[str] = frozenset()) -> list[Deviation]:
    """Return every setting that differs from the recipe that a config follows, section by section; none without one.

    Args:
        config: the experiment.
        stage2_slots: names of the slots in the prompt of stage 2, such as ``MatchID``.
    """
    recipe, model = config.evaluation.recipe, config.cf.model
    if recipe is None:
        return []
    path = RECIPES / _FILE_NAMES[recipe].format(model if model in _PAPER_CF_MODELS else "mf")
    paper = load_config(path)
    deviations = [
        *_compare_data(config, paper, recipe),
        *_compare_models(config),
        *_compare_settings(config, paper, path),
        *_compare_stages(config, paper, recipe),
    ]
    extra = sorted(stage2_slots - {"UserID", "TargetItemID"})
    if extra:
        ours = f"also slots {', '.join(extra)}"
        deviations.append(Deviation("prompt.stage2", ours, "slots UserID and TargetItemID"))
    sections = list(type(config).model_fields)
    return sorted(deviations, key=lambda deviation: sections.index(deviation.setting.split(".")[0]))


def _is_ready(config: Config) -> bool:
    """Return whether the data come split, which is taken for the authors' own split."""
    return config.dataset.split.method == "column"


def _compare_data(config: Config, paper: Config, recipe: Recipe) -> Iterator[Deviation]:
    if _is_ready(config):
        return
    data, split, paper_split = config.dataset, config.dataset.split, paper.dataset.split
    if data.format != paper.dataset.format:
        yield Deviation("dataset", data.asset or data.format, f"{recipe} as the authors prepared it")
    if split.method != paper_split.method:
        yield Deviation("dataset.split.method", split.method, paper_split.method)
    elif split.method == "calendar":
        for name in ("train_months", "valid_months", "test_months"):
            ours, months = getattr(split, name), getattr(paper_split, name)
            if ours != months:
                yield Deviation(f"dataset.split.{name}", _format(ours), _format(months))


def _compare_models(config: Config) -> Iterator[Deviation]:
    if _find_backbone(config.llm.backbone) is None:
        yield Deviation("llm.backbone", shorten_path(config.llm.backbone), "vicuna-7b or qwen2-1.5b")
    if config.cf.model not in _PAPER_CF_MODELS:
        yield Deviation("cf.model", config.cf.model, ", ".join(_PAPER_CF_MODELS))


def _compare_settings(config: Config, paper: Config, path: Path) -> Iterator[Deviation]:
    names = list(_SETTINGS if _is_ready(config) else _RAW_DATA_SETTINGS + _SETTINGS)
    if config.cf.model == paper.cf.model:
        names += [f"cf.{name}" for name in read_yaml(path)["cf"] if name not in _COMMON_CF_SETTINGS]
    names += [f"{section}.{name}" for section in ("stage1", "stage2") for name in _STAGE_SETTINGS]
    values = {name: _get(paper, name) for name in names}
    # The recipe files are Vicuna's; the paper gives Qwen2 another rate in stage 2 alone.
    is_qwen = _find_backbone(config.llm.backbone) == "qwen2-1.5b"
    learning_rates = BACKBONES["qwen2-1.5b"].settings if is_qwen else {}
    values["stage2.learning_rate"] = learning_rates.get("stage2.learning_rate", paper.stage2.learning_rate)
    for name, value in values.items():
        ours = _get(config, name)
        if not _is_equal(ours, value):
            yield Deviation(name, _format(ours), _format(value))


def _compare_stages(config: Config, paper: Config, recipe: Recipe) -> Iterator[Deviation]:
    for name, stage, paper_stage in (
        ("stage1", config.stage1, paper.stage1),
        ("stage2", config.stage2, paper.stage2),
    ):
        final = stage.learning_rate * stage.final_learning_rate_share
        paper_final = paper_stage.learning_rate * paper_stage.final_learning_rate_share
        if not math.isclose(final, paper_final, rel_tol=1e-6):
            ours = f"{stage.final_learning_rate_share:g} (ends at {final:g})"
            yield Deviation(f"{name}.final_learning_rate_share", ours, f"ends at {paper_final:g}")
        ours = "all of valid" if stage.max_valid_contexts is None else f"{stage.max_valid_contexts} contexts"
        yield Deviation(f"{name}.max_valid_contexts", ours, f"a random {_VALID_SHARES[recipe]} of valid")


def _find_backbone(name: str) -> str | None:
    """Return the name of the paper's backbone that this is, None if neither."""
    plain = name.lower().rsplit("/", 1)[-1]
    if plain.startswith("vicuna-7b"):
        return "vicuna-7b"
    return "qwen2-1.5b" if plain == "qwen2-1.5b" else None


def _get(config: Config, setting: str) -> Any:
    return reduce(getattr, setting.split("."), config)


def _is_equal(ours: Any, paper: Any) -> bool:
    if isinstance(ours, float) and isinstance(paper, float):
        return math.isclose(ours, paper, rel_tol=1e-9)
    return bool(ours == paper)


def _format(value: Any) -> str:
    """Return a value as a YAML file has it, None as none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_format(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
