"""Ranking with a finished run: the scores of its report, and requests beyond the report."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import collm_dist
from collm_dist import RankingRequest
from collm_dist.config.loader import load_config
from collm_dist.data.ingest.id_forms import IdIndex
from collm_dist.data.prompts.title_lists import take_context_ratings
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.errors import ArtifactError, RequestError
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.event_log import EventLog
from collm_dist.serving.finished_run import check_settings
from collm_dist.serving.requests import RankingQuery, RequestReader

# Float32 sums in another order: the largest measured difference is 1.3e-6, at scores of about 1.
TOLERANCE = 1e-5
LIKED, CANDIDATES = ["3", "17", "40"], [str(number) for number in range(41, 71)]


def test_stage_1_ranks_only_where_it_is_accepted(run_of_stage_1):
    with pytest.raises(ArtifactError, match=r"stage 2 is not done, so stage 1 would rank.*accept_stage1=True"):
        collm_dist.load_recommender(run_of_stage_1, device="cpu")


def read_reported(run_dir, model):
    """Return the evaluated rows of valid and test as requests, with the scores in the report's files."""
    data_dir = run_dir / "data"
    users, items = load_user_ids(data_dir), load_item_table(data_dir)["item_id"]
    tables = [pq.read_table(run_dir / "eval" / "scores" / f"{model}-{split}.parquet") for split in ("valid", "test")]
    scored = pa.concat_tables(tables).to_pydict()
    log = load_interactions(data_dir, ("row_id", "timestamp"))
    times = dict(zip(log["row_id"].tolist(), log["timestamp"].tolist(), strict=True))
    requests = [
        RankingRequest(users[user], None, [items[item]], times[row])
        for user, item, row in zip(scored["user_idx"], scored["item_idx"], scored["row_id"], strict=True)
    ]
    return requests, np.array(scored["score"])


def test_scores_are_those_of_the_report(finished_run, recommender):
    assert recommender.stage == "stage2"
    requests, reported = read_reported(finished_run, "stage2")
    scores = np.concatenate(recommender.score(requests))
    print("largest difference", np.abs(scores - reported).max(), "of", len(scores), "rows")
    assert len(scores) > 400
    assert np.abs(scores - reported).max() < TOLERANCE
    cf = np.concatenate(recommender.score_cf(requests))
    assert np.abs(cf - read_reported(finished_run, "cf")[1]).max() < TOLERANCE


def test_without_stage_2_the_scores_are_those_of_stage_1(finished_run, text_recommender):
    assert text_recommender.stage == "stage1"
    requests, reported = read_reported(finished_run, "stage1")
    assert np.abs(np.concatenate(text_recommender.score(requests)) - reported).max() < TOLERANCE
    assert len(text_recommender.rank(history=LIKED, num_retrieved=5)) == 5  # by the collaborative model


def test_neither_order_nor_company_matters(recommender):
    requests = [RankingRequest(user, history, CANDIDATES) for user, history in ((None, LIKED), ("5", None), ("6", []))]
    together = recommender.score(requests)
    for request, scores in zip(requests, together, strict=True):
        one_by_one = [RankingRequest(request.user, request.history, [item]) for item in CANDIDATES]
        assert np.abs(np.concatenate(recommender.score(one_by_one)) - scores).max() < TOLERANCE
        turned = RankingRequest(request.user, request.history, CANDIDATES[::-1])
        assert np.abs(recommender.score([turned])[0][::-1] - scores).max() < TOLERANCE
    assert len({tuple(scores.round(4)) for scores in together}) == 3


def test_a_context_is_computed_once_however_many_candidates(finished_run, recommender, monkeypatch):
    from collm_dist.llm.packed import prefix_cache

    computed = []
    plain = prefix_cache.run_prefix
    monkeypatch.setattr(prefix_cache, "run_prefix", lambda *args: computed.append(len(args[2])) or plain(*args))
    monkeypatch.setattr(recommender._scorer, "_max_tokens", 512)  # so that the candidates need several micro-batches
    requests = [RankingRequest(None, LIKED, [str(number) for number in range(1, 81)])]
    scores = recommender.score(requests)[0]
    assert computed == [1]
    monkeypatch.undo()
    assert np.abs(recommender.score(requests)[0] - scores).max() < TOLERANCE


def test_an_unknown_user_gets_a_ranking(recommender):
    ranked = recommender.rank(history=LIKED, candidates=CANDIDATES, top_k=10)
    assert [item.rank for item in ranked] == list(range(1, 11))
    assert [item.score for item in ranked] == sorted((item.score for item in ranked), reverse=True)
    assert all(f"Film {item.item_id} (" in item.title for item in ranked)
    assert recommender.rank(LIKED, CANDIDATES, user="nobody", top_k=10) == ranked
    # Unknown items of a history are skipped.
    assert recommender.rank(["no such item", *LIKED], CANDIDATES, top_k=10) == ranked
    assert len(recommender.rank(candidates=CANDIDATES)) == len(CANDIDATES)  # nothing is known about the user


def test_an_item_without_a_rating_is_ranked(finished_run, recommender):
    """At the first second of the log, no item has ratings, and the vectors of the first fold know no item."""
    first = int(load_interactions(finished_run / "data", ("timestamp",))["timestamp"].min())
    scores, later = recommender.score([RankingRequest(None, LIKED, CANDIDATES, time) for time in (first, None)])
    assert np.isfinite(scores).all()
    assert np.abs(scores - later).max() > 1e-3


def test_candidates_are_retrieved_among_what_is_new_to_the_user(finished_run, recommender):
    data_dir = finished_run / "data"
    log = load_interactions(data_dir, ("user_idx", "item_idx"))
    items = load_item_table(data_dir)["item_id"]
    seen = {items[item] for user, item in zip(*log.values(), strict=True) if user == 4}
    user = load_user_ids(data_dir)[4]
    retrieved = recommender.retrieve([RankingRequest(user), RankingRequest(None, LIKED)], 1000)
    assert set(retrieved[0]) == set(items) - seen
    assert set(retrieved[1]) == set(items) - set(LIKED)
    cf = recommender.score_cf([RankingRequest(user, None, retrieved[0])])[0]
    assert (np.diff(cf) <= TOLERANCE).all()
    ranked = recommender.rank(user=user, num_retrieved=7)
    assert {item.item_id for item in ranked} == set(retrieved[0][:7])
    assert recommender.rank(user=user, history=items) == []


def test_retrieval_keeps_to_allowed_items_and_leaves_out_blocked_ones(recommender):
    everything = recommender.retrieve([RankingRequest(None, LIKED)], 1000)[0]
    some, blocked = everything[::2], everything[:4]
    answer = recommender.retrieve([RankingRequest(None, LIKED, allowed=["no such item", *some], blocked=blocked)], 1000)
    assert answer == [[item for item in some if item not in blocked]]
    ranked = recommender.rank(LIKED, allowed=some, blocked=blocked, num_retrieved=3)
    assert {item.item_id for item in ranked} == set(answer[0][:3])
    with pytest.raises(RequestError, match="allowed and blocked limit what is retrieved"):
        recommender.rank(LIKED, CANDIDATES, blocked=blocked)


def test_a_wrong_query_spoils_none_of_the_others(finished_run, recommender):
    items = load_item_table(finished_run / "data")["item_id"]
    queries = [
        RankingQuery(history=LIKED, candidates=CANDIDATES),
        RankingQuery(history=LIKED, candidates=["41", "none"]),
        RankingQuery(user="5", top_k=4, num_retrieved=9),
        RankingQuery(history="3", candidates=CANDIDATES),
        RankingQuery(user="5", top_k=0),
        RankingQuery(user="5", history=items),  # no candidates are left
        RankingQuery(user="6", candidates=np.array([5, 6, 7])),
    ]
    answers = recommender.rank_many(queries)
    for place, message in (
        (1, "1 of 2 ids are not in"),
        (3, "history: '3' is not a list"),
        (4, "top_k: 0 is less than"),
    ):
        assert isinstance(answers[place], RequestError)
        assert message in str(answers[place])
        with pytest.raises(RequestError):
            recommender.rank(**vars(queries[place]))
    for place in (0, 2, 5, 6):
        alone = recommender.rank(**vars(queries[place]))
        assert [item.item_id for item in answers[place]] == [item.item_id for item in alone]
        assert np.allclose(
            [item.score for item in answers[place]], [item.score for item in alone], rtol=0, atol=TOLERANCE
        )
    assert [len(answers[place]) for place in (0, 2, 5, 6)] == [len(CANDIDATES), 4, 0, 3]
    assert recommender.rank_many([]) == []


def test_ids_may_be_numbers(recommender):
    assert recommender.rank([3, 17, 40], range(41, 71)) == recommender.rank(LIKED, CANDIDATES)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"candidates": []}, "candidates: the list is empty"),
        ({"candidates": ["41", "none", "9999"]}, r"2 of 3 ids are not in the run's item table \('none', '9999'\)"),
        ({"candidates": ["41", "42", "41"]}, "'41' occurs twice"),
        ({"candidates": "41"}, "'41' is not a list of ids"),
        ({"candidates": [4.5]}, "4.5 is not an id"),
        ({"history": "3", "candidates": ["41"]}, "history: '3' is not a list"),
        ({"candidates": ["41"], "as_of": "2024-01-01"}, "as_of: '2024-01-01' is not an integer"),
        ({"candidates": ["41"], "top_k": 0}, "top_k: 0"),
        ({"num_retrieved": 0}, "0 items cannot be retrieved"),
    ],
)
def test_wrong_requests_are_refused(recommender, request_, message):
    with pytest.raises(RequestError, match=message):
        recommender.rank(**request_)


def test_a_wrong_request_among_others_is_named(recommender):
    with pytest.raises(RequestError, match="request 1: candidates: the list is empty"):
        recommender.score([RankingRequest(candidates=["41"]), RankingRequest()])


def test_a_run_that_does_not_fit_together_is_refused(finished_run, tmp_path):
    with pytest.raises(ArtifactError, match="neither stage 2 nor stage 1 is done"):
        collm_dist.load_recommender(tmp_path)
    shutil.copytree(finished_run, tmp_path / "run")
    run_dir = RunDir(tmp_path / "run")
    run_dir.write_record("cf", run_dir.read_record("cf") | {"content_hash": "0" * 64})
    with pytest.raises(ArtifactError, match=r"upstream\.cf"):
        collm_dist.load_recommender(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ArtifactError, match=r"config\.yaml is missing"):
        collm_dist.load_recommender(tmp_path / "run")


def test_a_prompt_of_a_file_may_be_given_by_its_text(finished_run, tmp_path):
    """As in an export, whose config.yaml has the text and whose records have the file's name."""
    shutil.copytree(finished_run, tmp_path / "run")
    run_dir, config = RunDir(tmp_path / "run"), load_config(finished_run / "config.yaml")
    record = run_dir.read_record("stage2")
    named = {**record["fingerprint"], "config.prompt.stage2": "configs/prompts/mine.txt"}
    run_dir.write_record("stage2", record | {"fingerprint": named})
    assert check_settings(config, run_dir).prompt.stage2 == named["input.prompt"]
    other = config.prompt.model_copy(update={"stage2": config.prompt.stage2 + " "})
    with pytest.raises(ArtifactError, match=r"config\.prompt\.stage2"):
        check_settings(config.model_copy(update={"prompt": other}), run_dir)


def test_the_log_counts_strictly_before():
    random = np.random.default_rng(0)
    users, items = np.sort(random.integers(0, 5, 300)), random.integers(0, 8, 300)
    times = np.concatenate([np.sort(random.integers(100, 130, (users == user).sum())) for user in range(5)])
    labels = random.integers(0, 2, 300).astype(np.int8)
    log = EventLog(users, items, times, labels, num_users=6, num_items=10)
    assert log.end == times.max() + 1
    for as_of in (0, 100, 117, 129, log.end, 2**62):
        likes, rows = log.count_item_events(np.arange(10), as_of)
        before = times < as_of
        assert rows.tolist() == [int((before & (items == item)).sum()) for item in range(10)]
        assert likes.tolist() == [int(labels[before & (items == item)].sum()) for item in range(10)]
        for user in range(6):
            event_items, event_labels = log.find_user_events(user, as_of)
            assert event_items.tolist() == items[before & (users == user)].tolist()
            assert event_labels.tolist() == labels[before & (users == user)].tolist()
    assert len(log.find_user_events(-1, log.end)[0]) == 0


@pytest.mark.parametrize("every_event_is_a_like", [False, True])
def test_what_a_request_says_of_likes_and_dislikes(every_event_is_a_like):
    events = EventLog(*(np.array(column) for column in ([0, 0, 0], [1, 2, 3], [10, 20, 30])),
                      np.array([1, 0, 0], dtype=np.int8), num_users=1, num_items=9)  # fmt: skip
    ids = IdIndex([str(number) for number in range(9)])
    reader = RequestReader(IdIndex(["u"]), ids, events, max_history_length=5, max_dislikes=2,
                           every_event_is_a_like=every_event_is_a_like)  # fmt: skip

    def read(**fields):
        user = reader.read_user(RankingRequest(**fields))
        return user.history.tolist(), user.dislikes.tolist(), user.num_likes, user.num_rows, set(user.seen.tolist())

    assert read(user="u") == ([1], [2, 3], 1, 3, {1, 2, 3})
    assert read(user="u", as_of=30) == ([1], [2], 1, 2, {1, 2})
    # Given lists replace those of the log; its statistics stay.
    assert read(user="u", history=["5"], disliked=["6", "7", "?", "8"]) == ([5], [7, 8], 1, 3, {1, 2, 3, 5, 6, 7, 8})
    assert read(user="u", disliked=[]) == ([1], [], 1, 3, {1, 2, 3})
    likes, rows = (2, 2) if every_event_is_a_like else (2, 5)
    assert read(history=["5", "1"], disliked=["6", "7", "8"]) == ([5, 1], [7, 8], likes, rows, {5, 1, 6, 7, 8})
    likes = 1 if every_event_is_a_like else 0
    assert read(history=["5"]) == ([5], [], likes, likes, {5})
    assert read(disliked=["6"]) == ([], [6], 0, 0, {6})
    with pytest.raises(RequestError, match="disliked: 'ab' is not a list of ids"):
        read(disliked="ab")


def test_a_request_orders_likes_and_dislikes():
    events = EventLog(*(np.array(column) for column in ([0] * 5, [1, 2, 3, 4, 5], [10, 20, 30, 40, 40])),
                      np.array([1, 0, 1, 0, 1], dtype=np.int8), num_users=1, num_items=9)  # fmt: skip
    ids = IdIndex([str(number) for number in range(9)])
    reader = RequestReader(
        IdIndex(["u"]), ids, events, max_history_length=5, max_dislikes=2, every_event_is_a_like=False
    )

    def read(**fields):
        user = reader.read_user(RankingRequest(**fields))
        block = reader.build_block([user], [np.array([7, 8])])
        rated = take_context_ratings(block, 4).values.tolist()
        return [f"{'+' if value % 2 else '-'}{value // 2}" for value in rated], user.num_likes, user.num_rows

    assert read(user="u") == (["-2", "+3", "-4", "+5"], 3, 5)
    assert read(user="u", as_of=40) == (["+1", "-2", "+3"], 2, 3)
    labelled = {"history": ["8", "?", "6", "7", "1"], "history_labels": [1, 1, 0, 1, 0]}
    assert read(user="u", **labelled) == (["+8", "-6", "+7", "-1"], 3, 5)
    assert read(**labelled) == (["+8", "-6", "+7", "-1"], 2, 4)
    # Two lists do not say what was when: dislikes are spread between the likes.
    assert read(history=["1", "2"], disliked=["6", "7"]) == (["-6", "+1", "-7", "+2"], 2, 4)
    assert read(user="u", history=["8"]) == (["-2", "-4", "+8"], 3, 5)
    assert read(user="u", disliked=["8"]) == (["+1", "-8", "+3", "+5"], 3, 5)
    assert read(history=["1"], disliked=[]) == (["+1"], 1, 1)
    assert read() == ([], 0, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"history_labels": [1]}, "history_labels: .* give history"),
        ({"history": ["1"], "history_labels": [1], "disliked": []}, "leave out disliked"),
        ({"history": ["1"], "history_labels": [1, 0]}, "2 labels for 1 items of history"),
        ({"history": ["1"], "history_labels": ["1"]}, r"'1' is neither 1 \(liked\) nor 0 \(disliked\)"),
        ({"history": ["1"], "history_labels": 2}, "2 is neither 1"),
    ],
)
def test_wrong_labels_of_a_history_are_refused(recommender, fields, message):
    with pytest.raises(RequestError, match=message):
        recommender.rank(candidates=["41"], **fields)
