"""The data step on logs as people have them: without times, with ids in several forms, with lost item rows; what is
stored for prompts alone."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collm_dist.data.samples.splits import SPLITS
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ArtifactError, ConfigError, DataError
from collm_dist.orchestration.cluster import connect_ray
from tests.integration.preprocess_runs import GOOD, list_samples, make_config, preprocess, write_csv


@pytest.fixture(scope="module", autouse=True)
def _ray():
    config = make_config({"path": "unused", "columns": {"label": "label"}}, "unused")
    with connect_ray(config.cluster):
        yield


def test_the_order_of_the_rows_stands_for_missing_times(tmp_path):
    """Without timestamps the result is that of a log whose timestamps are the row numbers."""
    lines = "".join(f"{n % 4},{n % 6},{n % 5 + 1}\n" for n in range(60))
    (tmp_path / "log.csv").write_text(f"user_id,item_id,rating\n{lines}")
    untimed = {"path": str(tmp_path / "log.csv"), "columns": {"rating": "rating", "timestamp": None}}
    timed = write_csv(tmp_path / "numbered", [f"{n % 4},{n % 6},{n},{n % 5 + 1}" for n in range(60)])
    for name, dataset in (("untimed", untimed), ("timed", timed)):
        preprocess(make_config(dataset, tmp_path / name, pre={"ties": "order"}))
    samples = list_samples(tmp_path / "untimed")
    assert len(samples) == 60
    assert samples == list_samples(tmp_path / "timed")
    rows = load_interactions(tmp_path / "untimed" / "data", ("row_id", "split"))
    firsts = {name: rows["row_id"][rows["split"] == name].min() for name in SPLITS}
    assert firsts == {"train": 0, "valid": 48, "test": 54}


def write_days(folder, *, guest: bool) -> dict:
    """Write the same users and items as whole numbers, as numbers with fractions, and as both types of numbers."""
    log = folder / "log"
    log.mkdir()
    rows = [(user, item, 10**9 + 3600 * (5 * user + item)) for user in range(1, 5) for item in range(10, 15)]
    header = "user_id,item_id,timestamp\n"
    (log / "a.csv").write_text(header + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    (log / "b.csv").write_text(header + "".join(f"{u}.0,{i}.0,{t + 1}\n" for u, i, t in rows))
    (log / "c.jsonl").write_text(
        "".join(f'{{"user_id": {u}, "item_id": "{i}", "timestamp": {t + 2}}}\n' for u, i, t in rows)
    )
    users, items, times = zip(*rows, strict=True)
    columns = {"user_id": [float(user) for user in users], "item_id": items, "timestamp": [time + 3 for time in times]}
    pq.write_table(pa.table(columns), log / "d.parquet")
    if guest:
        (log / "e.csv").write_text(f"{header}guest,10,{10**9}\n")
    titles = [f"Title {item}" for item in range(10, 14)]
    pq.write_table(pa.table({"item_id": [10.0, 11.0, 12.0, 13.0], "title": titles}), folder / "items.parquet")
    (folder / "items.csv").write_text("item_id,title\n14.0,\n")
    return {"path": str(log), "items_path": f"{folder}/items.*", "feedback": "implicit"}


def test_a_number_is_the_same_user_and_item_in_every_form(tmp_path, capsys):
    (tmp_path / "forget.csv").write_text("user_id\n4.0\n")
    dataset = write_days(tmp_path, guest=False) | {"forget": str(tmp_path / "forget.csv")}
    manifest = preprocess(make_config(dataset, tmp_path / "run", evaluation={"num_candidates": 2}))
    data = tmp_path / "run" / "data"
    assert sorted(load_user_ids(data)) == ["1", "2", "3"]
    items = load_item_table(data)
    assert dict(zip(items["item_id"], items["title"], strict=True)) == {
        **{str(item): f"Title {item}" for item in range(10, 14)}, "14": "14"}  # fmt: skip
    assert manifest["input"]["facts"]["rows"] == 60
    assert manifest["dropped"] == {"forgotten users": 20}
    assert "data: all user ids are whole numbers, so an id such as '1.0' is read as '1'" in capsys.readouterr().out


def test_ids_stay_as_written_if_one_is_a_text(tmp_path, capsys):
    dataset = write_days(tmp_path, guest=True)
    preprocess(make_config(dataset, tmp_path / "run", evaluation={"num_candidates": 2}))
    users = load_user_ids(tmp_path / "run" / "data")
    assert sorted(users) == sorted([*"1234", *(f"{user}.0" for user in range(1, 5)), "guest"])
    assert "WARNING: user ids such as '1.0' are kept as they are written" in capsys.readouterr().out


def test_one_file_with_both_forms_of_a_number_is_refused(tmp_path):
    for number, lines in enumerate((["1,10,7,5", "1.0,11,8,5"], ["1,10,7,5", "2,10.0,8,5"])):
        dataset = write_csv(tmp_path / str(number), lines)
        kind, written = (("user", "1"), ("item", "10"))[number]
        with pytest.raises(DataError, match=rf"log\.csv: there are {kind} ids '{written}(\.0)?' and '{written}(\.0)?'"):
            preprocess(make_config(dataset, tmp_path / f"run{number}"))


def test_lost_item_rows_stop_the_step(tmp_path):
    dataset = write_csv(tmp_path, ["1,10,7,5", "2,11,8,5"])
    (tmp_path / "items.csv").write_text('item_id,title\n10,"A\n11,B\n12,"C"\n')
    with pytest.raises(DataError, match=r"items_path: 2 of 3 item rows.*(.|\n)*items\.csv:2"):
        preprocess(make_config(dataset | {"items_path": str(tmp_path / "items.csv")}, tmp_path / "run"))


def test_the_order_of_likes_and_dislikes_is_stored_for_prompts_that_show_it(tmp_path):
    dataset = write_csv(tmp_path, GOOD)
    plain = preprocess(make_config(dataset, tmp_path / "run"))
    assert not load_manifest(tmp_path / "run" / "data").has_order
    rated = {"prompt": {"stage2": "<RatedTitleList> <UserID> <TargetItemTitle>?"}}
    with pytest.raises(ArtifactError, match=r"input\.order of likes and dislikes: \(absent\) -> True"):
        preprocess(make_config(dataset, tmp_path / "run", **rated))
    manifest = preprocess(make_config(dataset, tmp_path / "run", **rated), force=True)
    assert load_manifest(tmp_path / "run" / "data").has_order
    assert manifest["content_hash"] != plain["content_hash"]
    # These shards serve other prompts too; made again elsewhere, they are the plain ones.
    assert preprocess(make_config(dataset, tmp_path / "run")) == manifest
    assert preprocess(make_config(dataset, tmp_path / "other"))["content_hash"] == plain["content_hash"]
    none = make_config(dataset, tmp_path / "none", pre={"max_dislikes": 0}, **rated)
    with pytest.raises(ConfigError, match=r"max_dislikes=0: prompt.stage2 has the field <RatedTitleList>"):
        preprocess(none)
