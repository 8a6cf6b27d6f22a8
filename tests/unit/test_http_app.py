"""The HTTP application without a server: malformed requests and internal errors."""

import asyncio
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm_dist.errors import ArtifactError, QueueFullError, RequestError
from collm_dist.serving.access import Access
from collm_dist.serving.batching import Pass
from collm_dist.serving.gateway import Gateway
from collm_dist.serving.http_app import ModelAnswer, build_app
from collm_dist.serving.http_schemas import HealthAnswer, RankBody
from collm_dist.serving.requests import RankedItem, Ranking, RankingQuery
from collm_dist.serving.service_options import ServiceOptions

HEALTH = HealthAnswer(ready=True, run="mine", stage="stage2", model="abc", device="cpu", users=2, items=3)
OPTIONS = ServiceOptions(max_candidates=4, max_history=3, request_timeout_s=0.2)
LIMITS = {"access": Access(None, None), "receive_timeout_s": 5, "request_timeout_s": 5, "max_body_kib": 1}
GOOD = {"history": ["1"], "candidates": ["2", 3]}
JSON = "application/json"


async def rank(query):
    """Answer with the query itself; certain users cause an error."""
    if query.user == "full":
        raise QueueFullError
    if query.user == "slow":
        await asyncio.sleep(10)
    if query.user == "broken":
        raise ArtifactError("stage2: the score of item 'x' is not finite")
    if query.user == "bug":
        raise KeyError("secret")
    if query.user == "wrong":
        return Pass(RequestError("candidates: 'x\ud800' is unknown"), 1, 0.001, 0.002)
    return Pass(
        ModelAnswer(Ranking([RankedItem(repr(query), 0.1 + 0.2, 1, "千と千尋")], ["user: '7' is new"]), "abc"),
        3,
        0.001,
        0.002,
    )


def ask(body, *, method="POST", path="/rank", content_type=JSON, chunks=None, length=None):
    """Call the application as a server would; return status, headers and the decoded body."""
    pieces = chunks or [body if isinstance(body, bytes) else json.dumps(body).encode()]
    declared = {"content-type": content_type, "content-length": length}
    headers = [(name.encode(), value.encode()) for name, value in declared.items() if value is not None]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    unread, sent = list(pieces), []

    async def receive():
        if not unread:
            await asyncio.sleep(10)
        return {"type": "http.request", "body": unread.pop(0), "more_body": bool(unread)}

    async def send(message):
        sent.append(message)

    async def run():
        await Gateway(build_app(rank, lambda: HEALTH, OPTIONS, [GOOD]), **LIMITS)(scope, receive, send)

    asyncio.run(run())
    start, *bodies = sent
    text = b"".join(part["body"] for part in bodies)
    kind = dict(start["headers"])[b"content-type"]
    answer = text.decode() if kind.startswith(b"text/html") else json.loads(text)
    return start["status"], dict(start["headers"]), answer, len(unread)


def test_a_query_arrives_as_it_was_sent():
    sent = {"user": 7, "history": ["a", 1], "candidates": ["2"], "as_of": 5, "top_k": 1, "num_retrieved": 4}
    sent["history_labels"] = [0, 1]
    status, headers, answer, _ = ask(sent)
    assert status == 200
    assert (answer["model"], answer["warnings"]) == ("abc", ["user: '7' is new"])
    assert answer["ranked"] == [
        {"item_id": repr(RankingQuery(**sent)), "score": 0.1 + 0.2, "rank": 1, "title": "千と千尋"}
    ]
    assert headers[b"x-scored-together"] == b"3"
    assert headers[b"server-timing"] == b"queue;dur=1.0, score;dur=2.0"
    floats = {"user": 7.0, "history": [1.0, "x"], "candidates": [2.0]}
    integers = RankingQuery(7, history=[1, "x"], candidates=[2], num_retrieved=4)
    assert ask(floats)[2]["ranked"][0]["item_id"] == repr(integers)
    assert ask({"user": "u"}, content_type="application/vnd.mine+json; charset=utf-8")[2]["ranked"][0][
        "item_id"
    ] == repr(RankingQuery("u", num_retrieved=4))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "body: not a JSON object"),
        (b"{", 400, "body: not JSON at character 1"),
        (b"\xff\xfe", 400, ""),
        (b'{"history": ["\xff"]}', 400, ""),
        (b"[" * 1000, 400, ""),
        (b"9" * 900, 422, "body: not a JSON object"),
        ([], 422, "body: not a JSON object"),
        (None, 422, "body: not a JSON object"),
        ("text", 422, "body: not a JSON object"),
        ({}, 422, "user: give a user or a history"),
        ({"candidates": ["1"]}, 422, "user: give a user or a history"),
        (GOOD | {"color": "red"}, 422, "color: unknown field; the fields are user, history, disliked, history_la"),
        (GOOD | {"history_labels": [2]}, 422, "history_labels.0: 2 is out of range; it must be at most 1"),
        (GOOD | {"history_labels": ["1"]}, 422, "history_labels.0: '1' is not an integer"),
        (GOOD | {"history_labels": 1}, 422, "history_labels: 1 is not a list of"),
        (GOOD | {"history": "1"}, 422, "history: '1' is not a list of ids"),
        (GOOD | {"history": {"1": 2}}, 422, "history: {'1': 2} is not a list of ids"),
        (GOOD | {"history": [1.5]}, 422, "history.0: 1.5 is not an id; ids are strings or integers"),
        (GOOD | {"candidates": [1.5, True, None, []]}, 422, "candidates.1: True is not an id; .*; and 1 more"),
        (GOOD | {"history": ["1"] * 4}, 422, "history: 4 items exceed the limit of 3; .* --max-history"),
        (GOOD | {"candidates": ["1"] * 5}, 422, "candidates: 5 items exceed the limit of 4; .* --max-candidates"),
        (GOOD | {"candidates": []}, 422, "candidates: the list is empty; give at least one item, or omit"),
        (GOOD | {"user": 1.5}, 422, "user: 1.5 is not an id"),
        (GOOD | {"user": False}, 422, "user: False is not an id"),
        (GOOD | {"as_of": "2024-01-01"}, 422, "as_of: '2024-01-01' is not an integer"),
        (GOOD | {"as_of": float("nan")}, 422, "as_of: nan is not an integer"),
        (GOOD | {"top_k": 0}, 422, "top_k: 0 is out of range; it must be at least 1"),
        (GOOD | {"num_retrieved": 5}, 422, "num_retrieved: 5 is out of range; it must be at most 4"),
        ({"user": "wrong"}, 422, "candidates: 'x\ud800' is unknown"),
        (GOOD | {"user": ["\ud800"]}, 422, r"user: \['\\ud800'\] is not an id"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(body, status, message):
    answered, headers, answer, _ = ask(body)
    assert answered == status, answer
    assert headers[b"content-type"] == b"application/json"
    assert re.search(message, answer["detail"]), answer
    assert list(answer) == ["detail"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"content_type": "text/plain"}, 415, "content-type: send the body as application/json"),
        ({"content_type": None}, 415, "content-type"),
        ({"content_type": "application/x-www-form-urlencoded"}, 415, "content-type"),
        ({"method": "GET"}, 405, "Method Not Allowed"),
        ({"path": "/nowhere"}, 404, "the service has POST /rank"),
    ],
)
def test_other_ways_to_go_wrong(options, status, message):
    answered, _, answer, _ = ask(GOOD, **options)
    assert (answered, list(answer)) == (status, ["detail"])
    assert message in answer["detail"]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["user", "history", "candidates", "as_of", "top_k", "num_retrieved", "color"])


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(FIELDS, ANY, max_size=4) | ANY)
def test_no_body_is_too_strange(body):
    status, _, answer, _ = ask(body)
    assert status in (200, 413, 422)
    assert ("detail" in answer) == (status != 200)


def test_a_large_body_is_refused_unread():
    piece = b" " * 512
    for options, left in (({"length": "2000"}, 4), ({}, 1)):  # without a declared length: once too much has been read
        status, _, answer, unread = ask(None, chunks=[piece] * 4, **options)
        assert (status, unread) == (413, left)
        assert answer == {
            "detail": "the body exceeds 1 KiB; send less, or start the service with a larger --max-body-kib"
        }


@pytest.mark.parametrize(
    ("user", "status", "message"),
    [
        ("full", 503, "64 requests are waiting; try again in a second"),
        ("slow", 504, "time limit of 0.2 s exceeded"),
        ("broken", 500, "the score of item 'x' is not finite"),
        ("bug", 500, "internal error; see the service's log"),
    ],
)
def test_errors_inside_end_in_words(user, status, message):
    answered, headers, answer, _ = ask({"user": user})
    assert answered == status
    assert message in answer["detail"]
    assert "secret" not in json.dumps(answer)
    assert (headers.get(b"retry-after") == b"1") == (status == 503)


def test_health_and_openapi():
    assert ask(b"", method="GET", path="/healthz")[2] == HEALTH.model_dump()
    document = ask(b"", method="GET", path="/openapi.json")[2]
    body = document["components"]["schemas"]["RankBody"]
    assert body["examples"] == [GOOD]
    assert all("description" in schema for schema in body["properties"].values())
    assert body["properties"]["candidates"]["anyOf"][0]["maxItems"] == 4
    statuses = "200 400 401 403 408 413 415 422 429 503 504"
    assert set(document["paths"]["/rank"]["post"]["responses"]) == set(statuses.split())


def test_the_docs_page_lists_everything_and_loads_nothing():
    status, _, page, _ = ask(b"", method="GET", path="/docs")
    assert status == 200
    assert "<code>POST /rank</code>" in page
    assert "<code>GET /healthz</code>" in page
    for name in RankBody.model_fields:
        assert f"<td><code>{name}</code></td>" in page
    assert "at least 1, at most 4" in page
    assert "-d &#x27;{&quot;candidates&quot;: [&quot;2&quot;, 3], " in page
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", page)
