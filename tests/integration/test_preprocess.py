"""Preprocessing on a real local Ray: figures, reproducibility, bad input, restarts, extension."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from tqdm import tqdm

from collm_dist.data.samples.splits import SPLITS
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError, CollmError, DataError
from collm_dist.orchestration.cluster import connect_ray, run_tasks
from tests.integration.preprocess_runs import (
    GOOD,
    ask_rated,
    complain,
    die_once,
    list_rated,
    list_samples,
    make_config,
    preprocess,
    ratings_of,
    run_command,
    write_csv,
)
from tests.reference.plain_samples import Row, compute_known_before


@pytest.fixture(scope="module", autouse=True)
def _ray():
    config = make_config({"path": "unused", "columns": {"label": "label"}}, "unused")
    with connect_ray(config.cluster):
        yield


@pytest.mark.parametrize(("ties", "contexts"), [("order", (18_515, 5_658, 4_138)), ("strict", (13_753, 4_360, 3_237))])
def test_released_split_has_its_figures(ml1m_dir, tmp_path, ties, contexts):
    dataset = {
        "path": str(ml1m_dir / "interactions.parquet"),
        "items_path": str(ml1m_dir / "items.parquet"),
        "columns": {"label": "label", "split": "split"},
        "split": {"method": "column"},
    }
    manifest = preprocess(make_config(dataset, tmp_path, pre={"ties": ties}))
    assert (manifest["num_users"], manifest["num_items"]) == (838, 3255)
    assert [manifest["splits"][name]["rows"] for name in SPLITS] == [33_891, 10_401, 7_331]
    assert tuple(manifest["splits"][name]["contexts"] for name in SPLITS) == contexts


@pytest.mark.parametrize("ties", ["order", "strict"])
def test_shards_and_tables_equal_a_plain_loop_over_the_log(tmp_path, ties):
    """All fields of a sample, from file to shard, for a log with many repetitions."""
    random = np.random.default_rng(7)
    rows = [
        Row(
            row,
            f"u{random.integers(9)}",
            f"i{random.integers(12)}",
            1_000_000_000 + int(random.integers(50)),
            int(random.integers(2)),
            str(random.choice(SPLITS)),
        )
        for row in range(400)
    ]
    lines = [f"{row.user},{row.item},{row.time},{row.label},{row.split}" for row in rows]
    (tmp_path / "log").mkdir()  # three files: row ids continue from file to file
    for number, start in enumerate(range(0, 400, 150)):
        text = "\n".join(["user_id,item_id,timestamp,label,split", *lines[start : start + 150]]) + "\n"
        (tmp_path / "log" / f"part-{number}.csv").write_text(text)
    dataset = {"path": str(tmp_path / "log"), "columns": {"label": "label", "split": "split"},
               "split": {"method": "column"}}  # fmt: skip
    limits = {"ties": ties, "max_history_length": 6, "max_dislikes": 3}
    prompt = {"history_length": 6, "stage1": "<RatedTitleList> <TargetItemTitle>?"}
    preprocess(make_config(dataset, tmp_path / "run", pre=limits, prompt=prompt))
    known = compute_known_before(rows, ties)
    counts = ("user_likes", "user_rows", "item_likes", "item_rows", "user_in_train", "item_in_train")
    data = tmp_path / "run" / "data"
    users, items, seen = load_user_ids(data), load_item_table(data)["item_id"], 0
    for split in SPLITS:
        for block in GlobalOrder(data, load_manifest(data), split, 0, 64, shuffle=False).iter_batches():
            for target, context in enumerate(block.target_contexts.tolist()):
                row, expected = rows[block.row_id[target]], known[int(block.row_id[target])]
                history = block.history_items[block.history_offsets[context] : block.history_offsets[context + 1]]
                dislikes = block.dislike_items[block.dislike_offsets[target] : block.dislike_offsets[target + 1]]
                assert [items[item] for item in history] == expected["history"][-6:]
                assert [items[dislike] for dislike in dislikes] == expected["dislikes"][-3:]
                assert block.num_likes[context] == len(expected["history"])
                rated = expected["rated"]
                assert list_rated(block.take_targets(np.array([target])), items) == rated[-3:]
                if ties == "strict":
                    assert ask_rated(data, row, rated, items) == [rated[-3:]] * 2
                found = (users[block.user_idx[context]], items[block.item_idx[target]], block.label[target],
                         block.timestamp[target])  # fmt: skip
                assert (*found, split) == (row.user, row.item, row.label, row.time, row.split)
                assert {name: getattr(block, name)[target] for name in counts} == {
                    name: expected[name] for name in counts
                }
                seen += 1
    assert seen == 400
    table = load_interactions(data, ("row_id", "num_likes", *counts))
    for position, row_id in enumerate(table["row_id"].tolist()):
        assert {name: table[name][position] for name in counts} == {name: known[row_id][name] for name in counts}
        assert table["num_likes"][position] == len(known[row_id]["history"])


def test_bytes_depend_on_no_worker_and_samples_on_no_partition(tiny_ratings, tmp_path, monkeypatch, capsys):
    def run(name: str, pre: dict | None = None, **cluster) -> dict:
        cluster = {"ray_num_cpus": 2, "object_store_gb": 0.1, **cluster}
        return preprocess(make_config(ratings_of(tiny_ratings), tmp_path / name, pre=pre or {}, cluster=cluster))

    wide, narrow = run("wide"), run("narrow", preprocess_parallelism=1)
    assert wide["content_hash"] == narrow["content_hash"]
    for shard in wide["shards"]:
        files = [(tmp_path / name / "data" / shard["path"]).read_bytes() for name in ("wide", "narrow")]
        assert files[0] == files[1]
    other = run("other", pre={"num_user_buckets": 5, "num_shards": 3, "contexts_per_record": 7})
    assert other["content_hash"] != wide["content_hash"]
    assert list_samples(tmp_path / "other") == list_samples(tmp_path / "wide")
    monkeypatch.setattr("collm_dist.data.ingest.file_parts.PART_BYTES", 1)
    monkeypatch.setattr("collm_dist.data.ingest.text_blocks.BLOCK_BYTES", 5000)
    config = make_config(ratings_of(tiny_ratings), tmp_path / "parts", monitoring={"progress_bar": True})
    parts, size = preprocess(config), (tiny_ratings / "ratings.csv").stat().st_size
    assert [parts[key] for key in parts if key != "fingerprint"] == [wide[key] for key in wide if key != "fingerprint"]
    assert size > 10_000  # several parts
    assert f" of {tqdm.format_sizeof(size)}B |" in capsys.readouterr().err


@pytest.mark.slow
def test_bytes_are_those_of_a_command_on_one_cpu(tiny_ratings, tmp_path, repository):
    """The same result from the command, on Ray with one CPU."""
    preprocess(make_config(ratings_of(tiny_ratings), tmp_path / "wide"))
    config = make_config(ratings_of(tiny_ratings), tmp_path / "single", cluster={"ray_num_cpus": 1})
    (tmp_path / "single.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    run_command(repository, tmp_path / "single.yaml")
    for path in sorted((tmp_path / "wide" / "data").rglob("*.*")):
        if path.is_file() and path.name != "manifest.json":
            relative = path.relative_to(tmp_path / "wide")
            assert (tmp_path / "single" / relative).read_bytes() == path.read_bytes(), relative


@pytest.mark.parametrize("days", [1, 7, 300])
def test_a_ratio_cuts_at_the_second_wherever_in_its_day(tmp_path, days):
    random = np.random.default_rng(days)
    times = 1_000_000_000 + random.integers(0, days * 86_400 // 60, 400) * 60  # some minutes are met more than once
    dataset = write_csv(tmp_path, [f"{row % 7},{row % 5},{time},{row % 5 + 1}" for row, time in enumerate(times)])
    preprocess(make_config(dataset | {"split": {"train_ratio": 0.75, "valid_ratio": 0.1}}, tmp_path / "run"))
    table = load_interactions(tmp_path / "run" / "data", ("row_id", "split"))
    cuts = [np.sort(times)[int(400 * share)] for share in (0.75, 0.85)]
    expected = [SPLITS[place] for place in np.searchsorted(cuts, times[table["row_id"]], side="right")]
    assert list(table["split"]) == expected


def test_item_state_equals_a_plain_count(tiny_ratings, tmp_path):
    preprocess(make_config(ratings_of(tiny_ratings), tmp_path))
    names = ("item_idx", "timestamp", "label", "item_likes", "item_rows", "user_idx", "user_in_train", "split")
    rows = load_interactions(tmp_path / "data", names)
    trained = set(rows["user_idx"][rows["split"] == "train"].tolist())
    for index in range(0, len(rows["item_idx"]), 17):
        before = (rows["item_idx"] == rows["item_idx"][index]) & (rows["timestamp"] < rows["timestamp"][index])
        assert rows["item_rows"][index] == before.sum()
        assert rows["item_likes"][index] == rows["label"][before].sum()
        assert rows["user_in_train"][index] == (rows["user_idx"][index] in trained)


def test_clicks_get_negatives_and_candidates(tiny_clicks, tmp_path):
    dataset = {
        "path": str(tiny_clicks),
        "columns": {"user_id": "user", "item_id": "item", "timestamp": "time"},
        "feedback": "implicit",
        "negatives_per_positive": 2,
    }
    manifest = preprocess(make_config(dataset, tmp_path, evaluation={"num_candidates": 4}))
    assert sum(split["real_rows"] for split in manifest["splits"].values()) == 60
    rows = load_interactions(tmp_path / "data", ("split", "sampled", "label", "group_id", "row_id", "user_rows"))
    assert np.all(rows["label"] == 1 - rows["sampled"])
    assert len(np.unique(rows["row_id"])) == len(rows["row_id"])
    _, sizes = np.unique(rows["group_id"][rows["split"] == "test"], return_counts=True)
    assert sizes.max() == 4


@pytest.mark.parametrize("ties", ["order", "strict"])
def test_candidates_share_the_context_of_their_positive_whatever_the_partition(tiny_clicks, tmp_path, ties):
    dataset = {"path": str(tiny_clicks), "columns": {"user_id": "user", "item_id": "item", "timestamp": "time"},
               "feedback": "implicit", "negative_sampling": "popularity"}  # fmt: skip

    def run(name: str, **counts) -> Path:
        sections = {"pre": {"ties": ties, **counts}, "evaluation": {"num_candidates": 5}}
        preprocess(make_config(dataset, tmp_path / name, **sections))
        return tmp_path / name

    folder = run("three")
    assert list_samples(folder) == list_samples(run("one", num_user_buckets=1, num_shards=1))
    rows = load_interactions(folder / "data", ("row_id", "group_id", "user_idx", "num_likes", "user_rows", "sampled"))
    places = {row: place for place, row in enumerate(rows["row_id"].tolist())}
    own = [places[group] for group in rows["group_id"].tolist()]
    assert rows["sampled"].sum() > 60
    assert not rows["sampled"][own].any()
    for name in ("user_idx", "num_likes", "user_rows"):
        np.testing.assert_array_equal(rows[name], rows[name][own])


def test_calendar_filters_count_rows_inside_the_windows(tmp_path):
    """Item b and user v have enough rows in total, but not inside the windows; no history has rows from outside."""
    day = 86400
    log = [(0, "u", "a"), (1, "u", "b"), (2, "v", "b"), (35, "u", "a"), (36, "w", "a"), (37, "v", "a"), (70, "u", "a"),
           (71, "w", "b"), (72, "w", "a"), (100, "u", "a"), (101, "w", "a")]  # fmt: skip
    dataset = write_csv(tmp_path, [f"{user},{item},{time * day},5" for time, user, item in log])
    dataset |= {"min_user_interactions": 2, "min_item_interactions": 2}
    dataset["split"] = {"method": "calendar", "train_months": [1, 1], "valid_months": [2, 2], "test_months": [3, 3]}
    manifest = preprocess(make_config(dataset, tmp_path / "run"))
    assert manifest["dropped"] == {"item filter": 1, "outside the split windows": 3, "user filter": 1}
    assert [manifest["splits"][name]["rows"] for name in SPLITS] == [2, 2, 2]
    rows = load_interactions(tmp_path / "run" / "data", ("num_likes", "timestamp"))
    assert rows["num_likes"][rows["timestamp"] == 35 * day].tolist() == [0]


def test_amazon_book_rule(tmp_path):
    """2017 with December cut in two; rows of other years are ignored, also by the filter."""
    dates = ["2016-05-01", "2017-01-01", "2017-06-01", "2017-11-30", "2017-12-01", "2017-12-02", "2017-12-20",
             "2017-12-31", "2018-01-01"]  # fmt: skip
    lines = [f"u,{item},{date},5" for item in ("a", "b") for date in dates] + ["v,a,2017-01-01,5", "v,a,2016-01-01,5"]
    dataset = write_csv(tmp_path, lines) | {"split": {"method": "amazon_book"}, "min_user_interactions": 2}
    manifest = preprocess(make_config(dataset, tmp_path / "run"))
    assert [manifest["splits"][name]["rows"] for name in SPLITS] == [6, 4, 4]
    assert manifest["dropped"] == {"outside the split windows": 5, "user filter": 1}


def test_items_that_the_item_file_lacks_are_bad_rows(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"{item},Film {item}\n" for item in range(8)))
    dataset = write_csv(tmp_path, GOOD) | {"items_path": str(tmp_path / "items.csv")}
    with pytest.raises(DataError, match=r"6 of 54 rows.*6 x unknown item(.|\n)*item '8' is not in the item file"):
        preprocess(make_config(dataset, tmp_path / "run"))
    manifest = preprocess(make_config(dataset | {"max_bad_row_share": 0.2}, tmp_path / "run"))
    assert manifest["dropped"] == {"unknown item": 6}
    assert manifest["input"]["facts"]["items_with_title_share"] == 0.8889
    assert manifest["num_items"] == 8


def test_redone_work_leaves_nothing_of_the_old_and_spares_a_linked_run(tiny_ratings, tmp_path):
    wide = {"num_user_buckets": 5, "num_shards": 3}
    preprocess(make_config(ratings_of(tiny_ratings), tmp_path / "run", pre=wide))
    manifest = preprocess(make_config(ratings_of(tiny_ratings), tmp_path / "run"), force=True)
    files = {str(path.relative_to(tmp_path / "run" / "data")) for path in (tmp_path / "run" / "data").rglob("*.*")}
    listed = {entry["path"] for entry in [*manifest["shards"], *manifest["buckets"]]}
    assert files == listed | {"manifest.json", "users.parquet", "items.parquet"}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "data").symlink_to(tmp_path / "run" / "data")
    preprocess(make_config(ratings_of(tiny_ratings), tmp_path / "linked", pre=wide), force=True)
    assert not (tmp_path / "linked" / "data").is_symlink()
    left = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    del left["record_hash"]
    assert left == manifest


def test_titles_count_for_the_content_hash(tiny_ratings, tmp_path):
    (tmp_path / "items.csv").write_text((tiny_ratings / "items.csv").read_text().replace("Film 7 ", "Movie 7 "))
    first = preprocess(make_config(ratings_of(tiny_ratings), tmp_path / "first"))
    second = preprocess(
        make_config(ratings_of(tiny_ratings) | {"items_path": str(tmp_path / "items.csv")}, tmp_path / "second")
    )
    assert first["items_hash"] == second["items_hash"]
    assert first["content_hash"] != second["content_hash"]


def test_ids_keep_their_indices_when_a_run_is_extended(tiny_ratings, tmp_path):
    preprocess(make_config(ratings_of(tiny_ratings), tmp_path / "first"))
    lines = (tiny_ratings / "ratings.csv").read_text().splitlines()
    more = tmp_path / "more"
    more.mkdir()
    (more / "items.csv").write_text((tiny_ratings / "items.csv").read_text() + '900,"New one"\n')
    (more / "ratings.csv").write_text("\n".join([*lines, "777,900,5,1100000000", "1,900,2,1100000001"]) + "\n")
    manifest = preprocess(
        make_config({**ratings_of(more), "extend_from": str(tmp_path / "first")}, tmp_path / "second")
    )
    old, new = load_user_ids(tmp_path / "first" / "data"), load_user_ids(tmp_path / "second" / "data")
    assert new[: len(old)] == old
    assert new[len(old) :] == ["777"]
    items = [load_item_table(tmp_path / name / "data")["item_id"] for name in ("first", "second")]
    assert items[1][:-1] == items[0]
    assert items[1][-1] == "900"
    assert sum(count for bucket in manifest["buckets"] for _, count in bucket["user_ranges"]) == len(new)


def test_done_is_skipped_and_changed_input_is_refused(tiny_ratings, tmp_path, capsys):
    for name in ("ratings.csv", "items.csv"):
        (tmp_path / name).write_bytes((tiny_ratings / name).read_bytes())
    config = make_config(ratings_of(tmp_path), tmp_path / "run")
    first = preprocess(config)
    assert preprocess(config) == first
    assert "done already" in capsys.readouterr().out
    with (tmp_path / "ratings.csv").open("a") as file:
        file.write("1,1,5,1200000000\n")
    with pytest.raises(ArtifactError, match=r"ratings\.csv.*\n.*--force data"):
        preprocess(config)
    assert preprocess(config, force=True)["input"]["rows"] == first["input"]["rows"] + 1


def test_interrupted_work_goes_on(tiny_ratings, tmp_path):
    """A folder in place of a shard stops the last tasks; the next run redoes only what is missing."""
    whole = preprocess(make_config(ratings_of(tiny_ratings), tmp_path / "whole"))
    config = make_config(ratings_of(tiny_ratings), tmp_path / "run")
    data = tmp_path / "run" / "data"
    (data / "shards" / "valid-00001.tar" / "obstacle").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"valid-00001\.tar: Is a directory; move the .*run the same command again"):
        preprocess(config)
    assert not (data / "manifest.json").exists()
    (work,) = data.glob(".work-*")
    read = json.loads((work / "chunk-00000.json").read_text())
    (work / "chunk-00000.json").write_text(json.dumps(read | {"examples": ["as read the first time"]}))
    for lost in (
        work / "samples-00001.arrow",
        data / "interactions" / "bucket-00002.parquet",
        work / "states-00000.json",
    ):
        lost.unlink()
    (data / "shards" / "valid-00001.tar" / "obstacle").rmdir()
    (data / "shards" / "valid-00001.tar").rmdir()
    done = preprocess(config)
    assert done["input"]["bad_examples"] == ["as read the first time"]
    assert done["content_hash"] == whole["content_hash"]
    assert [shard["sha256"] for shard in done["shards"]] == [shard["sha256"] for shard in whole["shards"]]
    assert not work.exists()


def test_damaged_shard_is_named(tiny_ratings, tmp_path):
    preprocess(make_config(ratings_of(tiny_ratings), tmp_path))
    data = tmp_path / "data"
    shard = data / "shards" / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    with pytest.raises(ArtifactError, match=r"train-00000\.tar.*damaged"):
        list(GlobalOrder(data, load_manifest(data), "train", 0, 8).iter_batches())


@pytest.mark.parametrize(
    ("change", "lines", "message"),
    [
        ({}, [*GOOD, "1,2,never,3", ",2,1000000000,3"], r"2 of 56 rows.*timestamp is not a time(.|\n)*log\.csv:56"),
        ({"expect": {"min_rows": 1000}}, GOOD, r"expect\.min_rows.*54 rows"),
        ({"expect": {"max_age_hours": 1}}, GOOD, r"max_age_hours"),
        ({"min_user_interactions": 100}, GOOD, r"no interaction is left"),
        ({"split": {"method": "calendar"}}, GOOD, r"no interaction is left"),
        ({}, [line for line in GOOD if line.startswith("1,")][:1] * 3, r"split '.*' is empty"),
    ],
)
def test_bad_input_stops_with_its_own_message(tmp_path, change, lines, message):
    dataset = {**write_csv(tmp_path, lines), **change}
    with pytest.raises(DataError, match=message) as caught:
        preprocess(make_config(dataset, tmp_path / "run"))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run" / "data" / "manifest.json").exists()


def test_filters_and_duplicates(tmp_path, capsys):
    lines = [*GOOD, "0,0,1000000001,5", "7,3,1000000500,4"]
    dataset = {**write_csv(tmp_path, lines), "duplicates": "collapse", "min_user_interactions": 2}
    manifest = preprocess(make_config(dataset, tmp_path / "run"))
    assert manifest["dropped"] == {"duplicates": 1, "user filter": 1}
    facts = manifest["input"]["facts"]
    shares = ("like_share", "users_with_one_event_share", "items_with_title_share")
    assert [facts[name] for name in ("rows", "users", "items", "ratings", *shares)] == [
        56, 7, 9, [1.0, 5.0], 0.3571, 0.1429, None]  # fmt: skip
    assert (facts["first_time"], "sample_rows" in facts) == ("2001-09-09 01:46:40", False)
    printed = capsys.readouterr().out
    assert "  likes: 35.7% of the rows; ratings from 1 to 5, a like is at least 4\n" in printed
    assert "  left out: 1 rows, user filter (for example user 7, item 3, 2001-09-09 01:55:00)\n" in printed
    rows = load_interactions(tmp_path / "run" / "data", ("user_idx", "item_idx", "label"))
    users, items = load_user_ids(tmp_path / "run" / "data"), load_item_table(tmp_path / "run" / "data")["item_id"]
    pair = (rows["user_idx"] == users.index("0")) & (rows["item_idx"] == items.index("0"))
    assert rows["label"][pair].tolist() == [1]


def test_a_dying_worker_is_replaced(tmp_path):
    """A task whose process is killed once is retried."""
    assert run_tasks(die_once, [(str(tmp_path / "died"),)], description="x", parallelism=1, progress_bar=False) == [
        "ok"
    ]


def test_errors_of_tasks_keep_their_kind(tmp_path):
    for numbers, in_order in (((1,), False), ((1, 2), True)):  # the second fails first
        with pytest.raises(CollmError, match="read me 1"):
            run_tasks(complain, [(number,) for number in numbers], description="x", parallelism=2, progress_bar=False,
                      in_order=in_order)  # fmt: skip
    assert ray.is_initialized()


def test_manifest_is_plain_json(tiny_ratings, tmp_path):
    started = time.time()
    preprocess(make_config(ratings_of(tiny_ratings), tmp_path))
    record = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert {"num_users", "num_items", "splits", "shards", "fingerprint", "content_hash"} <= record.keys()
    assert all({"path", "sha256", "rows", "contexts", "bytes"} <= shard.keys() for shard in record["shards"])
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime >= started - 1
