"""Small finished data step, written in the format of the run directory."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collm_dist.config import Config
from collm_dist.data.shards.context_block import TARGET_FIELDS
from collm_dist.data.shards.interactions import COLUMNS
from collm_dist.data.shards.manifest import compute_content_hash
from collm_dist.data.shards.shard_writer import write_shard
from collm_dist.runs.atomic_files import compute_file_hash, write_json
from collm_dist.runs.fingerprints import compute_fingerprint
from collm_dist.runs.run_dir import RunDir
from tests.unit.evaluation_data import build_block, count_strictly_before

NUM_USERS, NUM_ITEMS, NUM_BUCKETS = 24, 30, 4
STAGE1_PROMPT = "Liked: <ItemTitleList>. Would they like <TargetItemTitle>? Answer:"
STAGE2_PROMPT = "Liked: <ItemTitleList>. User <UserID>, item <TargetItemTitle> <TargetItemID> <MatchID>. Answer:"


def build_config(path, *overrides, feedback="explicit", **evaluation) -> Config:
    columns = {"rating": None, "label": "label"} if feedback == "explicit" else {}
    return Config.model_validate(
        {
            "run": {"dir": str(path)},
            "dataset": {"path": "logs/ratings.csv", "columns": columns, "feedback": feedback},
            "prompt": {"stage1": STAGE1_PROMPT, "stage2": STAGE2_PROMPT},
            "evaluation": {"bootstrap_samples": 30, "cutoffs": [1, 2], "num_candidates": 4, **evaluation},
            "monitoring": {"progress_bar": False},
        }
    )


def _build_rows(feedback, num_users, num_items, count, rows_per_second, taste):
    """Return rows of all splits in time order, with the last four users only in test.

    Labels follow item and user biases. With ``taste``, even users like even items and odd users odd items instead,
    which biases cannot express.
    """
    random = np.random.default_rng(0)
    quality = random.normal(size=num_items)
    mood = random.normal(size=num_users)
    rows = []
    for number in range(count):
        split = "train" if number < count * 4 // 6 else "valid" if number < count * 5 // 6 else "test"
        second = number // rows_per_second
        user = random.integers(0, num_users if split == "test" else num_users - 4)
        item = random.integers(0, num_items - (3 if split == "train" else 0))
        attraction = 2 * (-1) ** (user + item) if taste else quality[item] + mood[user]
        liked = int(attraction + random.normal() > 0)
        if feedback == "explicit":
            rows.append((user, item, second, liked, split, 0, len(rows), len(rows)))
        elif liked:
            group = len(rows)
            rows.append((user, item, second, 1, split, 0, group, group))
            for _ in range(3):
                rows.append((user, random.integers(0, num_items), second, 0, split, 1, len(rows), group))
    names = ("user_idx", "item_idx", "timestamp", "label", "split", "sampled", "row_id", "group_id")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _add_state(rows, ties):
    """Add as-of counts and train flags to the rows and return each row's earlier likes and dislikes."""
    real = rows["sampled"] == 0
    for kind in ("user", "item"):
        ids = rows[f"{kind}_idx"]
        order = np.argsort(rows["timestamp"] * 2 + rows["sampled"], kind="stable")
        likes, counts = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
        before_counts = count_strictly_before(ids[real], rows["timestamp"][real], rows["label"][real])
        likes[real], counts[real] = before_counts
        for row in order[~real[order]]:
            before = real & (ids == ids[row]) & (rows["timestamp"] < rows["timestamp"][row])
            likes[row], counts[row] = rows["label"][before].sum(), before.sum()
        rows[f"{kind}_likes"], rows[f"{kind}_rows"] = likes, counts
        rows[f"{kind}_in_train"] = np.isin(ids, ids[(rows["split"] == "train") & real]).astype(np.int64)
    liked = _list_before(rows, real & (rows["label"] == 1), rows["row_id" if ties == "order" else "timestamp"])
    rows["num_likes"] = np.array([len(items) for items in liked])
    return liked, _list_before(rows, real & (rows["label"] == 0), rows["timestamp"])


def _list_before(rows, marked, times):
    """Return the items of the marked rows of the same user with an earlier time, for each row."""
    return [
        rows["item_idx"][marked & (rows["user_idx"] == user) & (times < time)].tolist()
        for user, time in zip(rows["user_idx"], times, strict=True)
    ]


def _write_buckets(data_dir, rows, num_users, num_slices):
    """Write interactions by user, a quarter of the users in each bucket."""
    (data_dir / "interactions").mkdir()
    buckets, size = [], num_users // (NUM_BUCKETS * num_slices)
    order = np.lexsort((rows["row_id"], rows["timestamp"], rows["user_idx"]))
    for number in range(NUM_BUCKETS):
        chosen = order[rows["user_idx"][order] // size % NUM_BUCKETS == number]
        path = data_dir / "interactions" / f"bucket-{number:05d}.parquet"
        pq.write_table(pa.table({name: rows[name][chosen] for name in COLUMNS.names}).cast(COLUMNS), path)
        buckets.append(
            {
                "path": str(path.relative_to(data_dir)),
                "rows": len(chosen),
                "user_ranges": [[part * size, size] for part in range(number, NUM_BUCKETS * num_slices, NUM_BUCKETS)],
                "sha256": compute_file_hash(path),
            }
        )
    return buckets


def write_data_step(
    path,
    feedback="explicit",
    *,
    num_users=NUM_USERS,
    num_items=NUM_ITEMS,
    count=600,
    rows_per_second=1,
    taste=False,
    flip=None,
    num_slices=1,
    ties="strict",
    max_dislikes=0,
) -> RunDir:
    """Write interactions, tables, shards and manifest below ``path``.

    Args:
        ties, max_dislikes: as in ``PreprocessingConfig``.
        flip: row, or array of rows, whose label is inverted.
        num_slices: slices of users in each bucket; a run that is extended N times has N + 1.
    """
    run_dir = RunDir(path)
    data_dir = run_dir.step_dir("data")
    rows = _build_rows(feedback, num_users, num_items, count, rows_per_second, taste)
    if flip is not None:
        rows["label"][flip] = 1 - rows["label"][flip]
    likes, dislikes = _add_state(rows, ties)
    splits, shards = {}, []
    for split in ("train", "valid", "test"):
        chosen = np.flatnonzero(rows["split"] == split)
        block = build_block(
            rows["user_idx"][chosen],
            histories=[likes[row][-10:] for row in chosen],
            dislikes=[dislikes[row][-max_dislikes:] if max_dislikes else [] for row in chosen],
            num_likes=rows["num_likes"][chosen],
            **{name: rows[name][chosen] for name in TARGET_FIELDS},
        )
        shards.append(write_shard(data_dir, f"{split}-00000.tar", split, block, 64).__dict__)
        splits[split] = {
            "rows": len(chosen),
            "contexts": len(chosen),
            "real_rows": int((rows["sampled"][chosen] == 0).sum()),
            "first_timestamp": int(rows["timestamp"][chosen].min()),
            "last_timestamp": int(rows["timestamp"][chosen].max()),
        }
    buckets = _write_buckets(data_dir, rows, num_users, num_slices)
    texts = [f"item {number} {'even' if number % 2 == 0 else 'odd'}" for number in range(num_items)]
    ids = [str(number) for number in range(num_items)]
    pq.write_table(pa.table({"item_id": ids, "title": texts, "text": texts}), data_dir / "items.parquet")
    record = {
        "format_version": 1,
        "num_users": num_users,
        "num_items": num_items,
        "users_hash": "users",
        "items_hash": "items",
        "ties": ties,
        "fingerprint": compute_fingerprint(build_config(path, feedback=feedback), "data", run_dir),
        "feedback": feedback,
        "max_history_length": 10,
        "splits": splits,
        "shards": shards,
        "buckets": buckets,
        "dropped": {},
    }
    write_json(run_dir.record_path("data"), record | {"content_hash": compute_content_hash(record)})
    return run_dir
