"""A run whose prompts show texts of users and the order of ratings: the same in training, reports and requests."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import collm_dist
from collm_dist import RankingRequest
from collm_dist.config.loader import load_config
from collm_dist.data.prompts.prompt_preview import print_preview
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.export import export_model, import_model
from collm_dist.serving.licences import Licences
from collm_dist.serving.requests import RankingQuery
from tests.conftest import NUM_USERS, REPOSITORY
from tests.integration.finished_run import build_run
from tests.integration.ranking_service import serving
from tests.integration.test_recommender import TOLERANCE, read_reported
from tests.integration.test_serve import compare
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.slow
ITEMS = [str(number) for number in range(1, 41)]


@pytest.fixture(scope="module")
def user_run(tmp_path_factory, tiny_ratings, tiny_backbone_dir):
    """Run directory; user 3 has no text, and user 1000 has a text and no rows."""
    folder = tmp_path_factory.mktemp("users")
    lines = [f"{user},{18 + user % 50},city {user % 7}" for user in [*range(1, NUM_USERS + 1), 1000] if user != 3]
    (folder / "users.csv").write_text("id,age,city\n" + "\n".join(lines) + "\n")
    overrides = [
        f"run.dir={folder / 'run'}",
        f"dataset.path={tiny_ratings}/ratings.csv",
        f"dataset.items_path={tiny_ratings}/items.csv",
        f"dataset.users_path={folder}/users.csv",
        "dataset.user_text={age} years old, from {city}",
        "dataset.columns.user=id",
        f"llm.backbone={tiny_backbone_dir}",
        "prompt.stage1=configs/prompts/stage1_user.txt",
        "prompt.stage2=Of <UserText>: <RatedTitleList>. By <UserID>. Like <TargetItemTitle> <TargetItemID>? Answer:",
        "prompt.rated_length=4",
        "evaluation.splits=[valid,test]",
    ]
    return build_run(REPOSITORY / "configs" / "tiny_cpu.yaml", overrides)


@pytest.fixture(scope="module")
def recommender(user_run):
    return collm_dist.load_recommender(user_run, device="cpu")


def test_requests_get_the_scores_of_the_report(user_run, recommender):
    requests, reported = read_reported(user_run, "stage2")
    assert np.abs(np.concatenate(recommender.score(requests)) - reported).max() < TOLERANCE
    report = (user_run / "eval" / "report.md").read_text()
    assert "| earlier likes, user texts |" in report.replace("  ", "")
    assert "| ids, earlier likes and dislikes, user texts |" in report


def test_a_labelled_history_is_that_of_the_log(user_run, recommender):
    """Counts and vectors are those of the log's user in both, so only the order in the prompt could differ."""
    log = load_interactions(user_run / "data", ("user_idx", "item_idx", "label", "timestamp"))
    items, users = load_item_table(user_run / "data")["item_id"], load_user_ids(user_run / "data")
    for number in (0, 7, 30):
        own = log["user_idx"] == number
        history = [items[item] for item in log["item_idx"][own]]
        labels = log["label"][own].tolist()
        assert len(set(labels)) == 2
        logged, given, other = recommender.score(
            [
                RankingRequest(users[number], None, ITEMS),
                RankingRequest(users[number], history, ITEMS, history_labels=labels),
                RankingRequest(users[number], history[::-1], ITEMS, history_labels=labels[::-1]),
            ]
        )
        assert np.abs(given - logged).max() < TOLERANCE
        assert np.abs(other - logged).max() > TOLERANCE


def test_a_user_without_rows_has_a_text_and_an_unknown_user_does_not(recommender):
    """Users 3 and "nobody" have the text for unknown users; only the prompt tells user 1000 from them."""
    history = ["3", "17", "40"]
    registered, unknown, nobody = recommender.score(
        [RankingRequest(user, history, ITEMS) for user in ("1000", "nobody", None)]
    )
    assert np.array_equal(unknown, nobody)
    assert np.abs(registered - unknown).max() > 1e-6
    ranked = recommender.rank(user="1000", history=history, candidates=ITEMS)
    assert [item.score for item in ranked] == pytest.approx(sorted(registered, reverse=True), abs=TOLERANCE)
    assert recommender.rank_many([RankingQuery("1000", history, ITEMS)])[0] == ranked
    assert ranked.warnings == []
    assert len(recommender.rank(user="nobody", history=history, candidates=ITEMS).warnings) == 1


def test_a_service_takes_labelled_histories(user_run, recommender):
    """The order of likes and dislikes reaches the prompt as in Python, and mistakes are answered 422."""
    liked, both = {"history": ["3", "17", "40", "9"]}, {"history_labels": [1, 0, 0, 1]}
    queries = [liked | both, liked | {"history_labels": [0, 1, 0, 1]}, liked]
    queries += [query | {"user": user} for query in queries for user in ("5", "1000", "nobody")]
    queries += [liked | both | {"user": "5", "num_retrieved": 9}, {"history": [], "history_labels": []}]
    mistakes = [
        (liked | {"history_labels": [1, 0]}, "history_labels: 2 labels for 4 items of history; give one for each"),
        (liked | both | {"disliked": ["9"]}, "history_labels: they say which items of history are liked, so give"),
        (both | {"user": "5"}, "history_labels: they say which items of history are liked, so give history"),
        (liked | {"history_labels": [1, 0, 2, 1]}, "history_labels.2: 2 is out of range"),
        (liked | {"history_labels": [1, 0, True, 1]}, "history_labels.2: True is not an integer"),
        (liked | {"history_labels": 1}, "history_labels: 1 is not a list"),
    ]
    rankings = []
    with serving(user_run) as service:
        for query in queries:
            query = {"candidates": ITEMS} | query if "num_retrieved" not in query else query
            status, _, answer = service.ask(query)
            assert status == 200, answer
            expected = recommender.rank(**query)
            assert compare(answer, expected) < TOLERANCE
            assert answer["warnings"] == expected.warnings
            rankings.append({item["item_id"]: item["score"] for item in answer["ranked"]})
        found = [(status, answer["detail"]) for status, _, answer in (service.ask(body) for body, _ in mistakes)]
    assert [(422, message) for _, message in mistakes] == [
        (status, detail[: len(message)]) for (status, detail), (_, message) in zip(found, mistakes, strict=True)
    ]
    assert not {"3", "17", "40", "9"} & set(rankings[-2])  # all are known to the user
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert max(abs(rankings[first][item] - rankings[second][item]) for item in ITEMS) > TOLERANCE


def test_an_export_has_what_its_prompts_show(user_run, recommender, tmp_path):
    requests = [RankingRequest(user, None, ITEMS) for user in ("5", "1000", "3")]
    config = load_config(user_run / "config.yaml")
    export_model(config, RunDir(user_run), tmp_path / "model", Licences("MIT", "made up", "made up"))
    import_model(tmp_path / "model", RunDir(tmp_path / "run"))
    imported = collm_dist.load_recommender(tmp_path / "run", device="cpu")
    np.testing.assert_array_equal(imported.score(requests), recommender.score(requests))


def test_files_of_requests_take_users_by_id(user_run, recommender, tmp_path):
    from collm_dist.serving.part_scoring import OutputFolder, score_part
    from collm_dist.serving.request_files import write_parts

    users = ["1000", "nobody"]
    table = pa.table({"user_id": users, "candidates": [ITEMS] * 2, "history": [["3"]] * 2})
    pq.write_table(table, tmp_path / "requests.parquet")
    folder = OutputFolder(tmp_path / "scored")
    for path in (folder.requests, folder.scores(0).parent, folder.record(0).parent):
        path.mkdir(parents=True)
    write_parts(
        [tmp_path / "requests.parquet"], folder.requests, recommender.item_ids, retrieves=False, rows_per_part=9
    )
    score_part(recommender, folder, 0, None)
    scored = pq.read_table(folder.scores(0)).to_pydict()
    for user, expected in zip(users, recommender.score([RankingRequest(u, ["3"], ITEMS) for u in users]), strict=True):
        found = {item: score for name, item, score in zip(scored["user_id"], scored["item_id"], scored["score"],
                                                          strict=True) if name == user}  # fmt: skip
        assert [found[item] for item in ITEMS] == pytest.approx(expected, abs=TOLERANCE)


def test_the_preview_shows_texts_and_prompts(user_run, capsys):
    config = load_config(user_run / "config.yaml")
    print_preview(config, RunDir(user_run), 3, make_tokenizer)
    printed = capsys.readouterr().out
    assert "user texts: 59 users of the log have one, 1 have none; 1 users of the file are not in the log" in printed
    assert "years old, from city" in printed.split("stage2, row")[1]
    assert '" (liked)' in printed
    assert '" (disliked)' in printed
