"""Model card of an export: data, settings, metrics beside baselines, licences."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from collm_dist.config import Config
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.runs.damage import name_damage, read_json_file
from collm_dist.runs.run_dir import RunDir, StageName
from collm_dist.serving.licences import Licences, describe_license
from collm_dist.tuning.stage import get_stage

_USE = """## Use

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("model")       # the text model of stage 1
"""
_USE_ADAPTER = """
    from peft import PeftModel
    PeftModel.from_pretrained(backbone, "adapter")              # the same as an adapter of the published backbone
"""
_USE_ALL = """
collm-dist turns the folder into a run directory, for the whole recommender with collaborative vectors as soft tokens:

    python launch/import_model.py --input <this folder> --run-dir runs/imported
    python -c "import collm_dist; print(collm_dist.load_recommender('runs/imported').rank(history=[...], top_k=5))"
"""

_SCORES = {
    "yes_minus_no": "the logit of Yes minus that of No after the prompt in `prompt/`.",
    "yes": "the logit of Yes after the prompt in `prompt/`.",
    "title": "how much likelier the history makes the title in the prompt in `prompt/`.",
}


def write_card(
    path: Path, config: Config, run_dir: RunDir, stage: StageName, licences: Licences, *, with_events: bool = True
) -> None:
    """Write the card of a finished run.

    Args:
        path: path of the card.
        config: the run's settings.
        run_dir: directory of the run; the card includes its report, if it has been evaluated.
        stage: stage whose model scores.
        licences: licences of the parts.
        with_events: whether the export holds users and events.
    """
    base = _find_base(config, run_dir)
    contents = "ids, titles and events" if with_events else "item ids, titles and counts; no users and no events"
    has_adapter = (run_dir.step_dir("stage1") / "adapter").exists()
    library = "peft" if has_adapter else "transformers"
    head = ["---", *describe_license(licences.model), f"base_model: {json.dumps(base)}", f"library_name: {library}",
            "tags: [recommendation, collm]", "---", ""]  # fmt: skip
    lines = [
        "# A recommender that reads titles and collaborative vectors",
        "",
        f"`{base}`, {'LoRA-tuned' if has_adapter else 'all layers tuned'} on text prompts (stage 1)"
        + (
            ", with a mapping from collaborative vectors to soft tokens (stage 2)"
            if get_stage(config, stage).has_slots
            else ""
        )
        + ", after CoLLM (Zhang et al., arXiv 2310.19488). A score is "
        + _SCORES[config.prompt.score],
        "",
        _USE + (_USE_ADAPTER if has_adapter else "") + _USE_ALL,
        *_describe_data(run_dir),
        "",
        "## Licences",
        "",
        "| part | licence |",
        "|:--|:--|",
        f"| this model | {licences.model} |",
        f"| backbone `{base}` | {licences.backbone} |",
        f"| training data (`data/` has its {contents}) | {licences.data} |",
        "",
        "## Settings",
        "",
        "`config.yaml` has all settings, `records/` the inputs of each step.",
        "",
        *_describe_metrics(run_dir),
    ]
    path.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


def _find_base(config: Config, run_dir: RunDir) -> str:
    """Return the public name of the backbone, without a local path of the training machine."""
    path = run_dir.step_dir("stage1") / "adapter" / "adapter_config.json"
    if path.exists():
        name = "base_model_name_or_path"
        return str(read_json_file(path, name, remedy="redo stage 1 with --force stage1")[name])
    return Path(config.llm.backbone).name if Path(config.llm.backbone).exists() else config.llm.backbone


def _describe_data(run_dir: RunDir) -> list[str]:
    manifest = load_manifest(run_dir.step_dir("data"))
    lines = [
        "## Data",
        "",
        f"{manifest.num_users:,} users, {manifest.num_items:,} items, {manifest.feedback} feedback.",
        "",
        "| split | rows | from | to |",
        "|:--|--:|:--|:--|",
    ]
    for name, split in manifest.splits.items():
        days = [
            datetime.fromtimestamp(seconds, UTC).date() for seconds in (split.first_timestamp, split.last_timestamp)
        ]
        lines.append(f"| {name} | {split.rows:,} | {days[0]} | {days[1]} |")
    return lines


def _describe_metrics(run_dir: RunDir) -> list[str]:
    """Return the run's report without figures, its headings one level lower."""
    path = run_dir.step_dir("eval") / "report.md"
    if not run_dir.is_done("eval") or not path.exists():
        return ["## Evaluation", "", "The run was not evaluated."]
    with name_damage(path, "redo the step with --force eval"):
        lines = path.read_text(encoding="utf-8").splitlines()
    return [f"#{line}" if line.startswith("#") else line for line in lines if not line.startswith("![")]
