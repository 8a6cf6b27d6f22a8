"""Forgotten users: their rows are dropped, and extended id tables lose their ids."""

import json

import pandas as pd
import pyarrow as pa
import pytest

from collm_dist.data.ingest.forgotten_users import find_tombstones, load_forgotten
from collm_dist.data.shards.interactions import load_known_users, load_user_ids, load_user_texts
from collm_dist.errors import ArtifactError, ConfigError, DataError
from collm_dist.orchestration.cluster import connect_ray
from collm_dist.runs.run_dir import RunDir
from collm_dist.runs.user_deletion import find_held_users
from tests.integration.byte_search import find_text
from tests.integration.preprocess_runs import list_samples, make_config, preprocess

USERS, FORGOTTEN = [f"member-{number:02d}" for number in range(12)], ["member-03", "member-08"]
NOT_IN_ANY_LOG = "member-99"


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with connect_ray(make_config({"path": "unused", "columns": {"label": "label"}}, "unused").cluster):
        yield


def write_log(path, users, rows):
    """Write the rows of the given users among the first rows of a log."""
    lines = [
        f"{USERS[row % 12]},item-{row * 7 % 23},{1_000_000_000 + 3600 * row},{row * 5 % 7 % 5 + 1}"
        for row in range(rows)
    ]
    kept = [line for line in lines if line.split(",")[0] in users]
    path.write_text("user_id,item_id,timestamp,rating\n" + "\n".join(kept) + "\n")


def run(folder, name, log, **dataset):
    """Run the data step and return its manifest."""
    settings = {"path": str(log), "columns": {"rating": "rating"}, **dataset}
    return preprocess(make_config(settings, folder / name))


def without_rows(samples):
    """Return samples without row ids, which depend on line numbers."""
    return sorted((split, *rest) for split, _, *rest in samples)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.csv"
    write_log(path, USERS, 240)
    (tmp_path / "users.csv").write_text("user_id\n" + "\n".join([*FORGOTTEN, NOT_IN_ANY_LOG]) + "\n")
    return path


def test_a_log_with_users_to_forget_is_one_without_them(tmp_path, log):
    forget = str(tmp_path / "users.csv")
    manifest = run(tmp_path, "forgetting", log, forget=forget)
    filtered = run(tmp_path, "filtered", log, row_filter=f"user_id not in {FORGOTTEN}")
    assert manifest["content_hash"] == filtered["content_hash"]
    assert manifest["forgotten"] == {
        "users_asked": 3, "users_in_log": 2, "rows_passed_over": {str(log): 40}, "users_in_extended_run": 0,
        "tombstones": 0,
    }  # fmt: skip
    assert manifest["dropped"] == {"forgotten users": 40}
    assert not any(find_text(tmp_path / "forgetting", user) for user in FORGOTTEN)
    assert find_text(tmp_path / "forgetting", USERS[0]) == ["data/users.parquet"]  # the search finds what there is


@pytest.mark.parametrize("feedback", ["explicit", "implicit"])
def test_an_extended_table_forgets_names_and_keeps_indices(tmp_path, log, feedback):
    options = {"feedback": feedback}
    run(tmp_path, "one", log, **options)
    before = load_user_ids(tmp_path / "one" / "data")
    write_log(log, USERS, 264)
    options |= {"extend_from": str(tmp_path / "one"), "forget": str(tmp_path / "users.csv")}
    manifest = run(tmp_path, "two", log, **options)
    after = load_user_ids(tmp_path / "two" / "data")
    places = [before.index(user) for user in FORGOTTEN]
    assert find_tombstones(tmp_path / "two" / "data").tolist() == sorted(places)
    assert [user for index, user in enumerate(after) if index not in places] == [
        user for user in before if user not in FORGOTTEN
    ]
    assert (manifest["forgotten"]["users_in_extended_run"], manifest["forgotten"]["tombstones"]) == (2, 2)
    assert not any(find_text(tmp_path / "two", user) for user in FORGOTTEN)

    # The log of the third night is clean: the list is empty, the tombstones stay.
    write_log(log, [user for user in USERS if user not in FORGOTTEN], 264)
    (tmp_path / "nobody.csv").write_text("user_id\n")
    options |= {"extend_from": str(tmp_path / "two")}
    with pytest.raises(ConfigError, match=r"would come back\. Set dataset\.forget again"):
        run(tmp_path, "three", log, **options | {"forget": None})
    third = run(tmp_path, "three", log, **options | {"forget": str(tmp_path / "nobody.csv")})
    assert third["forgotten"]["tombstones"] == 2
    if feedback == "explicit":  # sampled dislikes are drawn by the numbers of lines
        run(tmp_path, "never", log)
        samples = [without_rows(list_samples(tmp_path / name)) for name in ("two", "three", "never")]
        assert samples[0] == samples[1] == samples[2]


def test_a_list_is_part_of_what_the_step_depends_on(tmp_path, log):
    forget = tmp_path / "users.parquet"
    pd.DataFrame({"user_id": FORGOTTEN}).to_parquet(forget)
    run(tmp_path, "one", log, forget=str(forget))
    pd.DataFrame({"user_id": FORGOTTEN[:1]}).to_parquet(forget)
    with pytest.raises(ArtifactError, match=r"users\.parquet"):
        run(tmp_path, "one", log, forget=str(forget))
    fingerprint = RunDir(tmp_path / "one").read_record("data")["fingerprint"]
    assert fingerprint["config.dataset.forget"] == str(forget)
    assert "member" not in json.dumps(fingerprint)


def test_lists_are_read_as_logs_are(tmp_path):
    path = tmp_path / "users.parquet"
    pd.DataFrame({"user_id": [3.0, 4.0, 3.0]}).to_parquet(path)
    assert load_forgotten(str(path)).to_pylist() == ["3", "4"]
    (tmp_path / "users.csv").write_text("name,user_id\nA, 17 \nB,u18\n")
    assert load_forgotten(str(tmp_path / "users.csv")).to_pylist() == ["17", "u18"]
    assert load_forgotten(None).to_pylist() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user\nu1\n", r"users\.csv has no column 'user_id' \(has user\)"),
        ("user_id,x\nu1,1\n,2\n", r"users\.csv, line 3: user_id is empty"),
        (
            "user_id\nu1\nu2,3\n",
            r"users\.csv:3: wrong number of columns .*2 columns, the header 1\); fix the list",
        ),
    ],
)
def test_a_list_that_is_not_whole_is_refused(tmp_path, log, text, message):
    (tmp_path / "users.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        run(tmp_path, "one", log, forget=str(tmp_path / "users.csv"))
    with pytest.raises(DataError, match=r"dataset\.forget: there is no file"):
        run(tmp_path, "one", log, forget=str(tmp_path / "absent.csv"))
    assert not (tmp_path / "one" / "data").exists()


def test_texts_of_users_are_forgotten_with_them(tmp_path, log):
    lines = [f"{user},{10 + number},live at {user}-street" for number, user in enumerate([*USERS[1:], NOT_IN_ANY_LOG])]
    (tmp_path / "people.csv").write_text("member,age,home\n" + "\n".join(lines) + "\n")
    texts = {"users_path": str(tmp_path / "people.csv"), "user_text": "{age}: {home}"}
    texts["columns"] = {"rating": "rating", "user": "member"}
    (tmp_path / "users.csv").write_text("user_id\n" + "\n".join(FORGOTTEN) + "\n")
    forget = {"forget": str(tmp_path / "users.csv")}
    manifest = run(tmp_path, "one", log, **texts, **forget)
    assert manifest["user_texts"] == {
        "hash": manifest["user_texts_hash"], "users_with_text": 9, "users_without_text": 1, "users_without_rows": 1,
        "rows": {},
    }  # fmt: skip
    assert not any(find_text(tmp_path / "one", user) for user in FORGOTTEN)
    table = load_user_texts(tmp_path / "one" / "data")
    assert table["user_id"][:-1] == load_user_ids(tmp_path / "one" / "data")
    assert dict(zip(*table.values(), strict=True)) == {
        user: text and f"{text}: live at {user}-street"
        for user, text in zip([*USERS, NOT_IN_ANY_LOG], [None, *range(10, 22)], strict=True)
        if user not in FORGOTTEN
    }
    # A user of whom there is a text alone is held too.
    (held,) = find_held_users([tmp_path / "one"], pa.array([NOT_IN_ANY_LOG]), load_known_users)
    assert held.count == 1

    # Without the file, the run is as it would be without it, and another file is another input.
    (tmp_path / "people.csv").write_text("member,age,home\nmember-00,1,x\n")
    with pytest.raises(ArtifactError, match=r"people\.csv"):
        run(tmp_path, "one", log, **texts, **forget)
    plain = preprocess(make_config({"path": str(log), "columns": {"rating": "rating"}, **forget}, tmp_path / "one"),
                       force=True)  # fmt: skip
    assert plain["content_hash"] != manifest["content_hash"]
    assert plain["shards"] == manifest["shards"]
    assert not (tmp_path / "one" / "data" / "user_texts.parquet").exists()
    assert load_user_texts(tmp_path / "one" / "data") is None
    assert load_known_users(tmp_path / "one" / "data") == load_user_ids(tmp_path / "one" / "data")
