"""Differences between an experiment and the paper's recipe (CoLLM, arXiv 2310.19488, and its official code)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from collm_dist.assets import BACKBONES
from collm_dist.cf.models.registry import list_arguments
from collm_dist.config import CfConfig, Config
from collm_dist.config.loader import load_config
from collm_dist.config.yaml_file import read_yaml
from collm_dist.data.prompts.prompt_template import SHIPPED, TEXTS, load_prompt_text
from collm_dist.runs.fingerprints import flatten_config
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
# All settings that decide about results are compared but these and those below them.
NOT_COMPARED = (
    # Compared in words by a function of their own.
    "dataset.format", "dataset.asset", "dataset.split", "cf.model", "prompt.stage1", "prompt.stage2", "llm.backbone",
    "stage1.final_learning_rate_share", "stage2.final_learning_rate_share",
    "stage1.max_valid_contexts", "stage2.max_valid_contexts",
    # Where the data are and how their files are read.
    "dataset.path", "dataset.version", "dataset.snapshot_id", "dataset.items_path", "dataset.item_version",
    "dataset.item_snapshot_id", "dataset.users_path", "dataset.user_version", "dataset.user_snapshot_id",
    "dataset.catalog", "dataset.columns", "dataset.item_columns", "dataset.timestamp_unit", "dataset.time_format",
    "dataset.delimiter", "dataset.item_delimiter", "dataset.user_delimiter", "dataset.header", "dataset.names",
    "dataset.item_names", "dataset.user_names", "dataset.encoding", "dataset.max_bad_row_share", "dataset.expect",
    # The packing of the same samples, and how the same weights are loaded and computed with.
    "preprocessing.num_user_buckets", "preprocessing.num_shards", "preprocessing.contexts_per_record",
    "llm.revision", "llm.attention", "llm.trust_remote_code",
    # Without effect unless a setting that is compared deviates: implicit feedback, folds, extended runs, other models.
    "dataset.negatives_per_positive", "dataset.negative_sampling", "evaluation.num_candidates", "evaluation.cutoffs",
    "cf.fold_epochs", "cf.warm_start", "stage1.refresh_every_days", "cf.user_vectors", "cf.item_vectors",
    "cf.arguments",
    # No part of a recipe: seeds, contents of the report, searches and promotions.
    "run", "cf.seeds", "evaluation.splits", "evaluation.train_contexts", "evaluation.bootstrap_samples",
    "evaluation.confidence", "evaluation.slots_ablation", "cf_search", "stage_search", "promotion",
)  # fmt: skip
# Settings of the CF model that mean the same for every model, and those that the paper does not give for every model.
_COMMON_CF_SETTINGS = {"select_metric", "cross_fit", "feedback", "item_text", "unknown_item_share"}
_PARTLY_PUBLISHED = {"embedding_dim", "global_batch_size"}
_LAYER_SETTINGS = {"num_layers", "num_heads", "attention_sizes", "hidden_sizes", "dropout"}


@dataclass(frozen=True)
class Deviation:
    """A setting that differs from the paper's: its dotted name, our value and the paper's."""

    setting: str
    ours: str
    paper: str


def list_deviations(config: Config, stage2_slots: frozenset[str] = frozenset()) -> list[Deviation]:
    """Return every setting that differs from the recipe that a config follows, section by section; none without one.

    Settings without an effect on results, and those of ``NOT_COMPARED``, do not count. Prompts are compared by text.

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
        *_compare_prompts(config, paper, stage2_slots),
        *_compare_stages(config, paper, recipe),
    ]
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
    ours, values = flatten_config(config), flatten_config(paper)
    # The recipe files are Vicuna's; the paper gives Qwen2 another rate in stage 2 alone.
    if _find_backbone(config.llm.backbone) == "qwen2-1.5b":
        values["stage2.learning_rate"] = BACKBONES["qwen2-1.5b"].settings["stage2.learning_rate"]
    left_out = {*NOT_COMPARED, *_list_unread_cf_settings(config.cf, paper.cf, path)}
    if _is_ready(config):
        left_out |= set(_RAW_DATA_SETTINGS)
    for name in values | ours:
        parts = name.split(".")
        if left_out & {".".join(parts[:length]) for length in range(1, len(parts) + 1)}:
            continue
        value, paper_value = ours.get(name), values.get(name)  # a setting that is off may be absent
        if not _is_equal(value, paper_value):
            yield Deviation(name, _format(value), _format(paper_value))


def _list_unread_cf_settings(cf: CfConfig, paper: CfConfig, path: Path) -> set[str]:
    """Return the settings of the CF model for which the paper has no value."""
    if cf.model != paper.model:
        unread = set(type(cf).model_fields) - _COMMON_CF_SETTINGS
    else:
        unread = _PARTLY_PUBLISHED - set(read_yaml(path)["cf"]) | (_LAYER_SETTINGS - set(list_arguments(cf, 1, 0)))
    return {f"cf.{name}" for name in unread}


def _compare_prompts(config: Config, paper: Config, stage2_slots: frozenset[str]) -> Iterator[Deviation]:
    if config.stage1.enabled and (deviation := _compare_text("prompt.stage1", config, paper)):
        yield deviation
    if extra := sorted(stage2_slots - {"UserID", "TargetItemID"}):
        yield Deviation("prompt.stage2", f"also slots {', '.join(extra)}", "slots UserID and TargetItemID")
    elif deviation := _compare_text("prompt.stage2", config, paper):
        yield deviation


def _compare_text(setting: str, config: Config, paper: Config) -> Deviation | None:
    ours, shipped = _get(config, setting), _get(paper, setting)
    if load_prompt_text(ours) == load_prompt_text(str(TEXTS / shipped.removeprefix(SHIPPED))):
        return None
    return Deviation(setting, "another text" if "<" in ours else f"the text of {shorten_path(ours)}", shipped)


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
    """Return a value as a YAML file has it, None as none; of a path the last name."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_format(part) for part in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    text = shorten_path(str(value))
    return text if text == " ".join(text.split()) else json.dumps(text, ensure_ascii=False)
