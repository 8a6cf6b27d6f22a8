"""The benchmark of ways of tuning: each way learns which titles people like."""

from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.title_tuning import Way, tune

TITLES = {item: f"{'good' if item % 2 else 'bad'} film {item}" for item in range(24)}


@pytest.mark.parametrize("way", [Way(rank=4), Way(rank=0), Way(form="question last")], ids=["lora", "full", "last"])
def test_a_way_learns_what_people_like(tiny_backbone_dir, way):
    rows = [(split, user, item, int(item % 2 == (user > 0))) for split in ("train", "valid")
            for user in range(6) for item in TITLES]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["split", "user_id", "item_id", "label"])
    settings = {"learning_rate": 1e-2, "steps": 40, "items_per_step": 8, "warmup_steps": 4}
    half, end = tune(replace(way, backbone=str(tiny_backbone_dir), **settings), frame, TITLES)
    assert (half["step"], end["step"]) == (20, 40)
    # The best possible AUC: five users of six like the good films, one the bad ones.
    assert end["auc"] > 0.8
