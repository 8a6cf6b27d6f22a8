"""Item vectors for TensorBoard's projector: as the CF model has them, and as the language model gets them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collm_dist import monitoring
from collm_dist.data.shards.interactions import load_item_table, read_bucket
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.llm.slot_mapping import map_vectors
from collm_dist.tuning.loaded_stage import LoadedStage

# Later than any row: selects the CF model of rows after the last fold.
_LATEST = 2**62


def write_projector_items(
    folder: Path, data_dir: Path, loaded: LoadedStage, weights: dict[str, Tensor], max_items: int
) -> None:
    """Write the CF vectors and the mapped vectors of the most frequent training items.

    Does nothing if no slot reads CF vectors.

    Args:
        folder: folder of the stage's event files.
        data_dir: the run's data folder.
        loaded: stage 2's model.
        weights: full trained weights on the CPU, by parameter name.
        max_items: most items.
    """
    if "slot_mapper.cf.out.weight" not in weights:
        return
    cf_model: Any = loaded.model.cf_model
    rows, likes = count_train_rows(data_dir)
    items = np.argsort(-rows, kind="stable")[:max_items]
    items = items[rows[items] > 0]
    trained = {
        name.removeprefix("cf_model."): weight for name, weight in weights.items() if name.startswith("cf_model.")
    }
    if trained:  # of the best step; the model has the last step's
        cf_model = copy.deepcopy(cf_model)
        cf_model.load_state_dict(trained, strict=False)
    with torch.no_grad():
        indices = torch.from_numpy(items).to(loaded.device)
        vectors = cf_model.item_vectors(indices, torch.full_like(indices, _LATEST)).float().cpu()
        mapped = map_vectors(weights, vectors)
    table = load_item_table(data_dir)
    monitoring.write_projector(
        folder,
        [
            monitoring.VectorSet("items, as mapped", mapped.numpy()),
            monitoring.VectorSet("items, collaborative", vectors.numpy()),
        ],
        {
            "title": [table["title"][item] for item in items],
            "item_id": [table["item_id"][item] for item in items],
            "training rows": rows[items].tolist(),
            "share of likes": [f"{share:.3f}" for share in likes[items] / rows[items]],
        },
    )


def count_train_rows(data_dir: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return two (num_items,) arrays: each item's training rows and likes, without sampled negatives."""
    manifest = load_manifest(data_dir)
    rows, likes = np.zeros((2, manifest.num_items), dtype=np.int64)
    for bucket in manifest.buckets:
        table = read_bucket(data_dir, bucket, ["item_idx", "label", "split", "sampled"]).to_pandas()
        events = table[(table["split"] == "train") & (table["sampled"] == 0)]
        rows += np.bincount(events["item_idx"], minlength=manifest.num_items)
        likes += np.bincount(events["item_idx"][events["label"] == 1], minlength=manifest.num_items)
    return rows, likes
