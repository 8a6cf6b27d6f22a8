"""The page's files and the endpoints that it asks, without a model."""

import asyncio
import json
import re

import pytest
from fastapi import FastAPI

from collm_dist.errors import QueueFullError, RequestError
from collm_dist.serving.batching import Pass
from collm_dist.serving.exploration import CompareAnswer, ModelComparison, SearchAnswer, add_comparison, add_search
from collm_dist.serving.http_app import build_app
from collm_dist.serving.item_search import FoundItem
from collm_dist.serving.ranking_comparison import ComparedItem, Comparison, NamedItem, Place
from collm_dist.serving.web_page import FILES, FOLDER, add_page
from tests.unit.test_http_app import GOOD, HEALTH, OPTIONS

HOSTILE = "<img src=x onerror=alert(1)> \u202e"
ITEM = ComparedItem("7", HOSTILE, Place(3.0, 1), None, Place(0.75, 1), Place(0.5, 1), 0.125, 0.125)
COMPARISON = Comparison([ITEM], 1, False, [NamedItem("1", "One")], [], ["user: unknown"])


class Index:
    def find(self, search, limit):
        return [FoundItem(search, HOSTILE, limit)], True


async def compare(query):
    if query.user == "full":
        raise QueueFullError
    if query.user == "slow":
        await asyncio.sleep(10)
    return Pass(
        RequestError("top_k: wrong") if query.user == "wrong" else ModelComparison(COMPARISON, "abc"), 1, 0.001, 0.002
    )


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = build_app(compare, lambda: HEALTH, OPTIONS, [GOOD])
    add_search(app, Index)
    add_comparison(app, compare, OPTIONS, [GOOD])
    add_page(app)
    return app


def ask(app, path, *, method="GET", body=b"", query=b"", headers=()):
    """Call the application as a server would; return status, headers and body."""
    sent = []
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query,
        "headers": [(b"content-type", b"application/json"), *headers], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, *bodies = sent
    return start["status"], dict(start["headers"]), b"".join(part.get("body", b"") for part in bodies)


@pytest.mark.parametrize("path", FILES)
def test_files_are_served_with_a_strict_policy(app, path):
    name, media_type = FILES[path]
    status, headers, content = ask(app, path)
    assert (status, content) == (200, (FOLDER / name).read_bytes())
    assert headers[b"content-type"].decode() == f"{media_type}; charset=utf-8"
    assert headers[b"x-content-type-options"] == b"nosniff"
    policy = dict(part.strip().split(" ", 1) for part in headers[b"content-security-policy"].decode().split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert {policy[kind] for kind in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert ask(app, path, method="HEAD")[0] == 200
    assert ask(app, path, headers=[(b"if-none-match", headers[b"etag"])])[::2] == (304, b"")


def test_the_page_is_complete_and_asks_no_other_host():
    assert {name for name, _ in FILES.values()} == {path.name for path in FOLDER.iterdir()}
    markup = (FOLDER / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r'(?:src|href)="([^"#]+)"', markup):
        assert f"/{name}" in FILES or name == "docs", name
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script>", markup)
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//\w+\.", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), path.name
    labels = set(re.findall(r'<label[^>]* for="(\w+)"', markup))
    fields = set(re.findall(r'<(?:input|select)[^>]* id="(\w+)"', markup))
    assert fields == labels


def test_items_are_searched_within_bounds(app):
    status, _, answer = ask(app, "/items", query=b"search=caf%C3%A9&limit=3")
    assert status == 200
    assert json.loads(answer) == {"items": [{"item_id": "café", "title": HOSTILE, "likes": 3}], "more": True}
    SearchAnswer(**json.loads(answer))
    assert json.loads(ask(app, "/items")[2])["items"][0] == {"item_id": "", "title": HOSTILE, "likes": 20}
    for query, message in (
        (b"limit=0", "limit: '0' is out of range; it must be at least 1"),
        (b"limit=51", "limit: '51' is out of range; it must be at most 50"),
        (b"limit=x", "limit: 'x'"),
        (b"search=" + b"a" * 201, "search: "),
    ):
        status, _, answer = ask(app, "/items", query=query)
        assert status == 422
        assert message in json.loads(answer)["detail"]


def test_a_comparison_has_all_parts(app):
    status, headers, answer = ask(app, "/compare", method="POST", body=json.dumps(GOOD).encode())
    assert (status, headers[b"x-scored-together"]) == (200, b"1")
    answer = json.loads(answer)
    CompareAnswer(**answer)
    assert answer["items"] == [
        {
            "item_id": "7", "title": HOSTILE, "popularity": {"score": 3.0, "rank": 1}, "collaborative": None,
            "language_model": {"score": 0.75, "rank": 1}, "anchor": {"score": 0.5, "rank": 1}, "llm": 0.125,
            "bias": 0.125,
        }
    ]  # fmt: skip
    assert (answer["model"], answer["history"]) == ("abc", [{"item_id": "1", "title": "One"}])
    assert answer["warnings"] == ["user: unknown"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"candidates": ["1"]}, 422, "user: give a user or a history"),
        ({"user": "wrong"}, 422, "top_k: wrong"),
        ({"user": "u", "num_retrieved": 5}, 422, "num_retrieved: 5 is out of range; it must be at most 4"),
        ({"user": "u", "colour": 5}, 422, "colour: unknown field"),
        ({"user": "full"}, 503, "requests are waiting"),
        ({"user": "slow"}, 504, "time limit of 0.2 s exceeded"),
    ],
)
def test_comparisons_are_refused_like_rankings(app, body, status, message):
    found, _, answer = ask(app, "/compare", method="POST", body=json.dumps(body).encode())
    assert (found, list(json.loads(answer))) == (status, ["detail"])
    assert message in json.loads(answer)["detail"]


def test_everything_is_described(app):
    document = json.loads(ask(app, "/openapi.json")[2])
    assert set(document["paths"]) == {"/rank", "/healthz", "/items", "/compare"}
    schemas = document["components"]["schemas"]
    assert {"RankBody", "CompareBody"} <= set(schemas)
    assert all("description" in field for field in schemas["CompareBody"]["properties"].values())
    assert "most liked" in schemas["CompareBody"]["properties"]["candidates"]["description"]
    assert schemas["CompareBody"]["properties"]["num_retrieved"]["maximum"] == 4
    assert schemas["CompareBody"]["examples"] == [GOOD]
    operation = document["paths"]["/compare"]["post"]
    assert operation["responses"].keys() == document["paths"]["/rank"]["post"]["responses"].keys()
    parameters = document["paths"]["/items"]["get"]["parameters"]
    assert all("description" in field for field in parameters)
    page = ask(app, "/docs")[2].decode()
    assert all(f"<code>{name}</code>" in page for name in ("GET /items", "POST /compare", "search", "limit", "blocked"))
