"""Texts of users: a file of users by the log's ids, with columns of its own."""

from __future__ import annotations

import gzip

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collm_dist.config import Config, DatasetConfig
from collm_dist.data.ingest.input_preview import preview_rows
from collm_dist.data.ingest.source import open_source
from collm_dist.data.ingest.user_texts import NO_MATCH, open_user_file, write_user_texts
from collm_dist.data.prompt_needs import check_prompt_needs
from collm_dist.data.shards.manifest import USER_TEXTS
from collm_dist.errors import ConfigError, DataError

USERS = [
    {"member": "u1", "age": 24, "city": "Delft &amp; Leiden"},
    {"member": " u2 ", "age": 61, "city": None},
    {"member": "u4", "age": None, "city": None},
    {"member": None, "age": 5, "city": "Bonn"},
    {"member": "u1", "age": 25, "city": "Delft"},
    {"member": "u7", "age": 33, "city": "K\u00f6ln\u200b"},
]
TEXTS = {"u1": "24 years, Delft & Leiden", "u2": "61 years,", "u7": "33 years, K\u00f6ln"}
TEMPLATE = "{age} years, {city}"
NO_IDS = pa.array([], pa.string())


def open_users(path, **settings):
    columns = {"rating": "rating", "user": "member"} | settings.pop("columns", {})
    values = {"path": "log.csv", "users_path": str(path), "user_text": TEMPLATE, "columns": columns, **settings}
    return open_user_file(DatasetConfig.model_validate(values))


def write_users(path, **options):
    users = pd.DataFrame(USERS).astype({"age": "Int64"})
    if path.suffix == ".parquet":
        users.to_parquet(path)
    elif path.suffix == ".jsonl":
        users.to_json(path, orient="records", lines=True)
    else:
        users.to_csv(path, index=False, **options)
    return path


@pytest.mark.parametrize("name", ["users.csv", "users.tsv", "users.parquet", "users.jsonl"])
def test_a_file_of_any_type_gives_the_same_texts(tmp_path, name):
    path = write_users(tmp_path / name, sep="\t" if name.endswith("tsv") else ",")
    users = open_users(path).read(NO_IDS)
    assert users.texts == TEXTS
    assert users.count() == {
        "rows without an id": 1,
        "rows of a user with another text": 1,
        "users without any value": 1,
    }


def test_unusual_files_have_the_same_settings_as_items(tmp_path):
    path = tmp_path / "users.txt.gz"
    path.write_bytes(gzip.compress("u1::24::K\xf6ln\nu2::61::Bonn\n".encode("latin1")))
    file = open_users(path, delimiter="::", encoding="latin1", user_names=["member", "age", "city"])
    assert file.read(NO_IDS).texts == {"u1": "24 years, K\u00f6ln", "u2": "61 years, Bonn"}
    path = tmp_path / "users.csv"
    path.write_text("member|age|city\nu1|24|Bonn\nu2|25\n")
    users = open_users(path, user_delimiter="|", delimiter=",").read(NO_IDS)
    assert (users.texts, list(users.count().values())) == ({"u1": "24 years, Bonn"}, [1])
    assert "users.csv:3" in next(iter(users.bad_rows.first.values()))
    folder = tmp_path / "country=NL"
    folder.mkdir()
    write_users(folder / "part.parquet")
    assert open_users(folder, user_text="{country}").read(NO_IDS).texts["u4"] == "NL"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {"user": "membr"}}, "no column 'membr'.*did you mean 'member'.*dataset.columns.user"),
        ({"columns": {"user": None, "user_id": "Member"}}, "no column 'Member'.*did you mean 'member'"),
        ({"user_text": "{age}, {cty}"}, "no column 'cty'.*did you mean 'city'.*dataset.user_text"),
        ({"users_path": "{folder}/none.csv"}, "dataset.users_path"),
        ({"user_text": "{age"}, "dataset.user_text: .* does not parse"),
        ({"user_text": "young"}, "dataset.user_text: 'young' needs column names in braces"),
    ],
)
def test_wrong_columns_and_paths_are_named_before_any_work(tmp_path, settings, message):
    settings = {key: value.replace("{folder}", str(tmp_path)) if key == "users_path" else value
                for key, value in settings.items()}  # fmt: skip
    with pytest.raises((DataError, ConfigError), match=message):
        open_users(settings.pop("users_path", write_users(tmp_path / "users.csv")), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"users_path": "users.csv"}, "users_path, a file of users, and user_text.*need each other"),
        ({"user_text": "{age}"}, "need each other"),
        ({"columns": {"rating": "rating", "user": "member"}}, "columns.user is for the file of users_path"),
        ({"user_names": ["a"]}, "user_names is for the file of users_path"),
        ({"user_delimiter": "|"}, "user_delimiter is for the file of users_path"),
    ],
)
def test_settings_that_miss_their_partner_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig.model_validate({"path": "log.csv", "columns": {"rating": "rating"}, **settings})


def test_a_prompt_that_shows_users_needs_their_file():
    dataset = {"path": "log.csv", "columns": {"rating": "rating"}}
    plain = {"run": {"dir": "run"}, "dataset": dataset}
    check_prompt_needs(Config.model_validate(plain))
    with_users = {"prompt": {"stage1": "configs/prompts/stage1_user.txt"}}
    with pytest.raises(ConfigError, match=r"prompt.stage1 has the field <UserText>.*set dataset.users_path"):
        check_prompt_needs(Config.model_validate(plain | with_users))
    check_prompt_needs(Config.model_validate(plain | with_users | {"stage1": {"enabled": False}}))
    dataset = dataset | {"users_path": "users.csv", "user_text": "{age}"}
    check_prompt_needs(Config.model_validate(plain | with_users | {"dataset": dataset}))


@pytest.mark.parametrize(("prompt", "field"), [("feedback", "Disliked"), ("rated", "Rated")])
def test_a_prompt_that_shows_dislikes_needs_them_stored(prompt, field):
    settings = {
        "run": {"dir": "run"},
        "dataset": {"path": "log.csv", "columns": {"rating": "rating"}},
        "prompt": {"stage2": f"configs/prompts/stage2_{prompt}.txt"},
    }
    assert check_prompt_needs(Config.model_validate(settings)) == (prompt == "rated")
    with pytest.raises(ConfigError, match=rf"max_dislikes=0: prompt.stage2 has the field <{field}TitleList>.*at least"):
        check_prompt_needs(Config.model_validate(settings | {"preprocessing": {"max_dislikes": 0}}))


def test_the_table_has_the_logs_users_first_and_forgets(tmp_path):
    path = write_users(tmp_path / "users.csv")
    dataset = open_dataset(path)
    nobody = pa.array([], pa.string())
    without = DatasetConfig.model_validate({"path": "log.csv", "columns": {"rating": "rating"}})
    assert write_user_texts(tmp_path, without, ["u1"], nobody) == {}
    assert not (tmp_path / USER_TEXTS).exists()
    record = write_user_texts(tmp_path, dataset, ["u3", "u2"], pa.array(["u7"]))
    assert pq.read_table(tmp_path / USER_TEXTS).to_pydict() == {
        "user_id": ["u3", "u2", "u1"], "text": [None, TEXTS["u2"], TEXTS["u1"]]
    }  # fmt: skip
    assert record["users_with_text"] == record["users_without_text"] == record["users_without_rows"] == 1
    assert record["examples"]["rows of a user with another text"].endswith("('u1')")
    forgetting = write_user_texts(tmp_path, dataset, ["u3", "u2"], pa.array(["u1", "u7"]))
    assert forgetting["rows"] == {"rows without an id": 1, "users without any value": 1}
    assert "'u1'" not in str(forgetting["examples"])
    other = write_user_texts(tmp_path, dataset, ["u2", "u3"], pa.array(["u7"]))
    assert other["hash"] != record["hash"]


def test_a_number_is_the_same_user_as_in_the_log(tmp_path):
    users = pd.DataFrame({"member": [1.0, 2.0, 4.0], "age": [24, 61, 30], "city": ["Bonn", "Delft", "Leiden"]})
    for path in (tmp_path / "users.parquet", tmp_path / "users.csv"):
        users.to_parquet(path) if path.suffix == ".parquet" else users.to_csv(path, index=False)
        record = write_user_texts(tmp_path, open_dataset(path), ["1", "2", "3"], pa.array(["4"]))
        assert (record["users_with_text"], record["users_without_rows"]) == (2, 0)
    record = write_user_texts(tmp_path, open_dataset(path), ["1.0", "guest"], pa.array(["4"]))  # ids are texts
    assert (record["users_with_text"], record["users_without_rows"]) == (1, 1)


def open_dataset(path, log="log.csv", max_bad_row_share=0.5):
    return DatasetConfig.model_validate(
        {"path": str(log), "users_path": str(path), "user_text": TEMPLATE, "max_bad_row_share": max_bad_row_share,
         "columns": {"rating": "rating", "user": "member"}}
    )  # fmt: skip


def test_lost_rows_of_users_are_limited(tmp_path):
    path = write_users(tmp_path / "users.csv")
    path.write_text(path.read_text() + "u8,12\nu9,1,Ulm\n")
    rows = {"rows of a user with another text": 1, "rows without an id": 1, "wrong number of columns": 1}
    record = write_user_texts(tmp_path, open_dataset(path, max_bad_row_share=3 / 8), ["u1"], NO_IDS)
    assert record["rows"] == {**rows, "users without any value": 1}
    with pytest.raises(DataError) as caught:
        write_user_texts(tmp_path, open_dataset(path, max_bad_row_share=0.37), ["u1"], NO_IDS)
    message = str(caught.value)
    assert "dataset.users_path: 3 of 8 user rows cannot be used (" in message
    assert "more than dataset.max_bad_row_share=0.37 allows; fix the file or raise the limit" in message
    assert f"{path}:5: rows without an id" in message
    assert f"{path}:6: rows of a user with another text ('u1')" in message
    assert f"{path}:8: wrong number of columns" in message


def test_the_preview_shows_the_texts_as_they_are_understood(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,rating\nu1,a,1000000000,5\nu3,a,1000000001,1\n")
    dataset = open_dataset(write_users(tmp_path / "users.csv"), tmp_path / "log.csv")
    lines = preview_rows(open_source(dataset))
    assert lines[-5:] == [
        "user texts: 1 users of the log have one, 1 have none; 2 users of the file are not in the log",
        f"user file: 1 x rows of a user with another text (for example {tmp_path}/users.csv:6 ('u1'))",
        f"user file: 1 x rows without an id (for example {tmp_path}/users.csv:5)",
        "user file: 1 x users without any value",
        "user u1: 24 years, Delft & Leiden",
    ]
    (tmp_path / "forget.csv").write_text("user_id\nu1\n")
    forgetting = dataset.model_copy(update={"forget": str(tmp_path / "forget.csv")})
    assert "Delft & Leiden" not in "\n".join(preview_rows(open_source(forgetting)))
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,rating\n1,a,1000000000,5\n2,a,1000000001,1\n")
    assert f"WARNING: {NO_MATCH}" in preview_rows(open_source(dataset))
