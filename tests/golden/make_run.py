"""Script that made the run in ``run_of_0_1`` with release 0.1: ``python -m tests.golden.make_run``.

The folder stands for the runs on users' disks, so it is never rebuilt: later releases must resume from it. Its stage 2
was killed after step five of six. ``run_of_0_1.json`` holds the result of the same run without the kill.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from tests.conftest import write_items, write_ratings
from tests.golden.collect import collect_evaluation, collect_rankings, collect_stage, read_json
from tests.golden.records import FOLDER, write_record
from tests.integration.finished_run import build_run
from tests.tiny import save_backbone

ASSET = FOLDER / "run_of_0_1"
# Modification times stand in fingerprints, and a checkout has its own: the inputs all get this one.
INPUT_TIME = 1_700_000_000
OVERRIDES = [
    "run.dir=run",
    "dataset.path=ratings.csv",
    "dataset.items_path=items.csv",
    "llm.backbone=backbone",
    "cf.cross_fit=2",
    "stage2.max_steps=6",
    "stage2.eval_every_steps=3",
    "lora.dropout=0.1",
    "mapping.mask_probability=0.2",
    "monitoring.tensorboard=false",
]
STEPS_DONE = ("data", "cf", "stage1")
LAST_CHECKPOINT, LAST_STEP = 4, 5


def set_input_times(folder: Path) -> None:
    """Give the input files the time that the fingerprints have."""
    for path in (folder / "ratings.csv", folder / "items.csv", *(folder / "backbone").iterdir()):
        os.utime(path, (INPUT_TIME, INPUT_TIME))


def collect_expected(run: Path) -> dict[str, object]:
    """Return what the run comes to, and the fingerprints of its steps."""
    steps = {"data": "manifest", "cf": "summary", "stage1": "summary", "stage2": "summary", "eval": "report"}
    stage2 = collect_stage(run, "stage2")
    # These count what the last process has seen.
    for name in ("split_contexts", "dropped_history_items"):
        del stage2["summary"][name]
    return {
        "stage2": stage2,
        "eval": collect_evaluation(run),
        "rank": collect_rankings(run),
        "fingerprints": {step: read_json(run / step / f"{name}.json")["fingerprint"] for step, name in steps.items()},
    }


def main() -> None:
    """Make the run, record it, and leave it as if it had been killed."""
    settings = FOLDER.parents[1] / "configs" / "tiny_cpu.yaml"
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        write_ratings(Path("ratings.csv"), rows_per_user=12)
        write_items(Path("items.csv"))
        save_backbone(Path("backbone"))
        set_input_times(Path())
        run = build_run(settings, OVERRIDES)
        write_record(ASSET.with_suffix(".json"), collect_expected(run))
        shutil.rmtree(run / "eval")
        stage2 = run / "stage2"
        for name in ("summary.json", "mapping.safetensors", "checkpoints/step-000000006.safetensors"):
            (stage2 / name).unlink()
        shutil.rmtree(stage2 / "tensorboard", ignore_errors=True)
        lines = (stage2 / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= LAST_STEP]
        (stage2 / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
        shutil.rmtree(ASSET, ignore_errors=True)
        shutil.copytree(scratch, ASSET)


if __name__ == "__main__":
    main()
