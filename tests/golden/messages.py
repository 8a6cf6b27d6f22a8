"""User mistakes and their messages: settings, inputs, artifacts, prompts and requests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import collm_dist
from collm_dist.errors import CollmError
from tests.golden.commands import list_places, replace_paths, run_script

MISTAKES = {
    "misspelt": ["stage1.lerning_rate=1", "dataset.formatt=table"],
    "foreign": ["seed=1", "lora_r=4", "output_dir=x", "stage1.per_device_train_batch_size=4"],
    "types": ["stage1.learning_rate=-1", "cf.embedding_dim=many", "preprocessing.ties=ordr", "evaluation.splits=test"],
    "syntax": ["nonsense", "run.dir.x=1", "lora.target_modules=[a", ".=1"],
    "history": ["prompt.history_length=60"],
    "no_data": ["dataset.path=null"],
    "two_sources": ["dataset.asset=ml-100k"],
    "credentials": ["dataset.path=s3://KEY:hidden@bucket/x"],
    "cf_none": ["cf.model=none"],
    "train_cf": ["stage2.train_cf=true", "cf.model=lightgcn"],
    "zero_3": ["cluster.zero_stage=3", "llm.compile=true"],
    "promotion": ["promotion.min_paired_difference=0", "promotion.metric=ndcg@3"],
    "split": ["dataset.split.train_ratio=0.9", "dataset.split.valid_ratio=0.2"],
}
# Of a copy of a finished run: script, arguments.
REFUSALS = {
    "changed_setting": ("train", ["stage1.learning_rate=0.5"]),
    "changed_twice": ("train", ["stage2.max_steps=3", "mapping.hidden_multiple=3", "--stage", "2"]),
    "changed_data": ("preprocess_data", ["preprocessing.num_shards=3"]),
    "missing_file": ("preprocess_data", ["dataset.path=none.csv", "run.dir=<fresh>"]),
    "missing_column": ("preprocess_data", ["dataset.columns.item_id=product", "run.dir=<fresh>"]),
    "nothing_before": ("train", ["run.dir=<fresh>"]),
    "prompt_field": ("train", ["--force", "stage1", "prompt.stage1=Like <TargetItemTitel>? Answer:"]),
    "prompt_slots": ("train", ["--force", "stage2", "--stage", "2", "prompt.stage2=Like <TargetItemTitle>? Answer:"]),
    "prompt_file": ("train", ["--force", "stage1", "prompt.stage1=none.txt"]),
    "prompt_length": ("train", ["--force", "stage1", "--stage", "1", "prompt.max_prompt_tokens=30"]),
    "micro_batch": ("train", ["--force", "stage1", "--stage", "1", "stage1.max_tokens_per_micro_batch=16"]),
    "deepspeed_file": ("train", ["--deepspeed_config", "none.json"]),
    "backbone": ("train", ["--force", "stage1", "--stage", "1", "llm.backbone=./none"]),
}
REQUESTS = {
    "unknown_candidates": {"candidates": ["none", "nil"], "user": "5"},
    "no_candidates": {"candidates": []},
    "twice": {"candidates": ["5", "5"]},
    "text_for_list": {"history": "5", "candidates": ["5"]},
    "bad_id": {"history": [1.5], "candidates": ["5"]},
    "bad_time": {"as_of": "now", "candidates": ["5"]},
    "bad_count": {"top_k": 0, "candidates": ["5"]},
    "none_retrieved": {"num_retrieved": 0},
}


def collect_messages(run: Path, folder: Path) -> dict[str, Any]:
    """Return exit code and message of each mistake.

    Args:
        run: a finished one.
        folder: an empty one.
    """
    settings = run / "config.yaml"
    places = {str(folder / "run"): "<copy>", str(folder / "fresh"): "<fresh>", **list_places(run)}
    places[str(Path.cwd())] = "<here>"
    found: dict[str, Any] = {"settings": {}, "commands": {}, "requests": {}}
    for name, overrides in MISTAKES.items():
        code, _, errors = run_script("run_pipeline", "--config", str(settings), "--dry-run", *overrides)
        found["settings"][name] = {"given": overrides, "exit_code": code, "says": errors.splitlines()}
    for name, (script, arguments) in REFUSALS.items():
        for place in (folder / "run", folder / "fresh"):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(run, folder / "run")
        given = [argument.replace("<fresh>", str(folder / "fresh")) for argument in arguments]
        code, _, errors = run_script(script, "--config", str(settings), f"run.dir={folder}/run", *given)
        found["commands"][name] = {"script": script, "given": arguments, "exit_code": code, "says": errors.splitlines()}
    recommender = collm_dist.load_recommender(run, device="cpu")
    for name, request in REQUESTS.items():
        try:
            recommender.rank(**request)
            message = "nothing"
        except CollmError as error:
            message = f"{error.name}: {error}"
        found["requests"][name] = {"given": request, "says": message}
    return replace_paths(found, places)
