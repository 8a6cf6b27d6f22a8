"""The HTTP service of a finished run: the rankings of the Python API under concurrency, and 4xx otherwise."""

import http.client
import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from collm_dist import RankingRequest
from collm_dist.data.shards.interactions import load_item_table, load_user_ids
from collm_dist.serving.http_schemas import HealthAnswer, RankAnswer
from collm_dist.serving.requests import RankingQuery
from tests.doc_blocks import read_blocks
from tests.integration.ranking_service import TOKEN, serving

ROOT = Path(__file__).parents[2]
# Float32 sums in another order, with other requests in the pass: the largest measured difference is 1.2e-6.
TOLERANCE = 1e-5
LIKED = ["3", "17", "40"]
LIMITS = ["--max-candidates", "60", "--max-history", "20", "--max-body-kib", "4", "--batch-wait-ms", "100"]
LIMITS += ["--receive-timeout-s", "3"]


@pytest.fixture(scope="module")
def service(finished_run):
    with serving(finished_run, *LIMITS) as running:
        yield running


def compare(answer, expected):
    """Check a ranking against the Python API's; return the largest difference of a score."""
    ranked = answer["ranked"]
    assert [ranked_item["rank"] for ranked_item in ranked] == list(range(1, len(expected) + 1))
    scores = {ranked_item.item_id: ranked_item.score for ranked_item in expected}
    titles = {ranked_item.item_id: ranked_item.title for ranked_item in expected}
    difference = 0.0
    for answer_row, expected_row in zip(ranked, expected, strict=True):
        assert answer_row["title"] == titles[answer_row["item_id"]]
        # Items whose scores are equal up to rounding may swap places.
        assert (
            answer_row["item_id"] == expected_row.item_id or abs(answer_row["score"] - expected_row.score) < TOLERANCE
        )
        difference = max(difference, abs(answer_row["score"] - scores[answer_row["item_id"]]))
    return difference


def make_queries(finished_run):
    items, users = load_item_table(finished_run / "data")["item_id"], load_user_ids(finished_run / "data")
    queries = [
        {"history": items[number : number + 4], "candidates": items[number + 10 : number + 40]}
        for number in range(0, 40, 5)
    ]
    queries += [{"user": user, "candidates": items[20:45]} for user in users[:6]]
    queries += [{"user": users[7], "as_of": 1_010_000_000, "candidates": [int(item) for item in items[:9]]}]
    queries += [{"user": "nobody", "history": LIKED, "num_retrieved": 12, "top_k": 5}, {"user": users[3], "top_k": 60}]
    return queries


def test_rankings_are_those_of_the_python_api(finished_run, service, recommender):
    largest = 0.0
    for query in make_queries(finished_run):
        status, headers, answer = service.ask(query)
        assert status == 200, answer
        assert headers["X-Scored-Together"] == "1"
        RankAnswer(**answer)
        largest = max(largest, compare(answer, recommender.rank(**{"num_retrieved": 60} | query)))
    print("largest difference", largest)
    assert largest < TOLERANCE


def test_who_asks_at_once_is_answered_in_one_pass(finished_run, service, recommender):
    queries = make_queries(finished_run)
    barrier = threading.Barrier(len(queries))

    def ask(query):
        barrier.wait()
        return service.ask(query)

    with ThreadPoolExecutor(len(queries)) as pool:
        found = list(pool.map(ask, queries))
    assert {status for status, _, _ in found} == {200}
    sizes = [int(headers["X-Scored-Together"]) for _, headers, _ in found]
    print("passes", sum(1 / size for size in sizes), "for", len(sizes), "requests")
    assert max(sizes) >= 4
    assert sum(1 / size for size in sizes) < len(sizes) / 2
    differences = [
        compare(answer, recommender.rank(**{"num_retrieved": 60} | query))
        for query, (_, _, answer) in zip(queries, found, strict=True)
    ]
    print("largest difference", max(differences))
    assert max(differences) < TOLERANCE


def test_an_unseen_user_gets_a_ranking(service, recommender):
    status, _, answer = service.ask({"history": LIKED, "top_k": 10})
    assert status == 200
    assert len({item["item_id"] for item in answer["ranked"]} - set(LIKED)) == 10
    retrieved = recommender.retrieve([RankingRequest(None, LIKED)], 60)[0]
    assert {item["item_id"] for item in answer["ranked"]} <= set(retrieved)


MALFORMED = [
    (b"", 422, "not a JSON object"),
    (b'{"history": ["3"', 400, "not JSON at character"),
    (b"\x00\xff", 400, ""),
    (b"[" * 3000, 400, ""),
    ([1, 2], 422, "not a JSON object"),
    ({"candidates": ["3"]}, 422, "user: give a user or a history"),
    ({"history": LIKED, "candidates": ["41", "none", "9999"]}, 422, "2 of 3 ids are not in the run's item table"),
    ({"history": LIKED, "candidates": ["41", 41]}, 422, "'41' occurs twice"),
    ({"history": LIKED, "candidates": ["\ud800"]}, 422, "1 of 1 ids are not in the run's item table"),
    ({"history": LIKED, "candidates": []}, 422, "candidates: the list is empty"),
    ({"history": LIKED, "candidates": [str(number) for number in range(61)]}, 422, "61 items exceed the limit of 60"),
    ({"history": ["3"] * 21}, 422, "history: 21 items exceed the limit of 20"),
    ({"history": "3"}, 422, "is not a list of ids"),
    ({"user": {"$ne": 1}}, 422, "user: {'$ne': 1} is not an id"),
    ({"user": "1", "num_retrieved": 61}, 422, "num_retrieved: 61 is out of range"),
    ({"user": "1", "limit": 5}, 422, "limit: unknown field"),
    ({"user": "x" * 5000}, 413, "exceeds 4 KiB"),
]


@pytest.mark.parametrize(("body", "status", "message"), MALFORMED)
def test_what_is_wrong_is_answered_4xx(service, body, status, message):
    found, headers, answer = service.ask(body)
    assert (found, list(answer)) == (status, ["detail"])
    assert headers["content-type"] == "application/json"
    assert message in answer["detail"]


def test_other_requests_that_cannot_be_answered(service):
    assert service.ask({"user": "1"}, headers={"Content-Type": "text/plain"})[0] == 415
    assert service.ask({"user": "1"}, headers={})[0] == 415
    assert service.ask(None, method="GET")[0] == 405
    assert "POST /rank" in service.ask(None, method="GET", path="/nowhere")[2]["detail"]
    long = (b" " * 1024 for _ in range(100))  # without a declared length
    assert service.ask(long)[0] == 413
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_who_lacks_the_token_learns_only_that_the_service_is_there(service):
    for wrong in ("", "Bearer none", f"Basic {TOKEN}"):
        for method, path in (("POST", "/rank"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/-/routes")):
            status, headers, answer = service.ask({}, method=method, path=path, headers={"Authorization": wrong})
            assert (status, headers["WWW-Authenticate"], list(answer)) == (401, "Bearer", ["detail"])
    assert service.ask(None, method="GET", path="/healthz", headers={"Authorization": ""})[0] == 200


def test_what_arrives_too_slowly_is_cut_off(service):
    beginning = f"POST /rank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    for sent, missing in ((beginning, "headers"), (beginning + b"Content-Length: 9\r\n\r\n{", "body")):
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as raw:
            raw.sendall(sent)
            answer = raw.makefile("rb").read()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert f"the {missing} did not arrive within 3 s" in json.loads(body)["detail"]


def test_the_documented_answers_are_those_of_today(service):
    """docs/serving.md shows a request with its answer, and /healthz, of the run of these tests."""
    blocks = [block for block in read_blocks(ROOT / "docs" / "serving.md") if block.language in ("text", "json")]
    exchange = next(block.text for block in blocks if block.text.startswith("POST /rank"))
    request, head, shown = exchange.removeprefix("POST /rank\n").rstrip().split("\n\n")
    status, headers, answer = service.ask(json.loads(request))
    assert head.startswith(f"HTTP/1.1 {status} OK\n")
    for line in head.splitlines()[1:]:
        name, _, value = line.partition(": ")
        assert re.sub(r"[\d.]+", "N", headers[name]) == re.sub(r"[\d.]+", "N", value)
    documented = json.loads(shown)
    assert list(answer) == list(documented)
    for row, shown_row in zip(answer["ranked"], documented["ranked"], strict=True):
        assert row == shown_row | {"score": pytest.approx(shown_row["score"], abs=1e-3)}, "renew docs/serving.md"
    health = next(json.loads(block.text) for block in blocks if block.text.startswith('{"ready"'))
    answer = service.ask(None, method="GET", path="/healthz")[2]
    assert answer == health | {name: answer[name] for name in ("model", "since")}  # differ between machines
    assert health["model"] == documented["model"]


def test_health_and_openapi(finished_run, service, recommender):
    status, _, answer = service.ask(None, method="GET", path="/healthz")
    assert status == 200
    health = HealthAnswer(**answer)
    assert (health.ready, health.run, health.stage) == (True, finished_run.name, "stage2")
    record = json.loads((finished_run / "stage2" / "summary.json").read_text(encoding="utf-8"))
    assert record["content_hash"].startswith(health.model)
    assert (health.users, health.items) == (len(recommender.user_ids), len(recommender.item_ids))
    status, _, document = service.ask(None, method="GET", path="/openapi.json")
    schema = document["components"]["schemas"]["RankBody"]
    assert document["openapi"].startswith("3.")
    assert all(value.get("description") for value in schema["properties"].values())
    assert len(schema["examples"]) == 2
    for example in schema["examples"]:
        assert service.ask(example)[0] == 200
    page = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    page.request("GET", "/docs", headers={"Authorization": f"Bearer {TOKEN}"})
    assert b"openapi.json" in page.getresponse().read()


def test_the_page_and_what_it_asks(service, recommender):
    page = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    page.request("GET", "/")  # the page itself needs no token
    answer = page.getresponse()
    assert b"page.js" in answer.read()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    status, _, found = service.ask(None, method="GET", path="/items?search=AMELIE&limit=1")
    assert (status, found["items"][0]["title"]) == (200, "Amélie — 2001")
    query = {"history": LIKED, "num_retrieved": 20}
    status, _, comparison = service.ask(query, path="/compare")
    assert status == 200, comparison
    expected = recommender.compare(RankingQuery(**query))
    assert {item["item_id"] for item in comparison["items"]} == {item.item_id for item in expected.items}
    scores = {item.item_id: item.language_model.score for item in expected.items}
    assert all(
        abs(item["language_model"]["score"] - scores[item["item_id"]]) < TOLERANCE for item in comparison["items"]
    )
    with ThreadPoolExecutor(6) as pool:  # rankings and comparisons share the model, one pass at a time
        answers = list(pool.map(lambda path: service.ask(query, path=path)[0], ["/rank", "/compare"] * 3))
    assert set(answers) == {200}


def read_metrics(port):
    """Return the service's own metrics by name and first tag, as Ray exports them for Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^ray_(collm_\w+)\{(.*)\} ([\d.e+-]+)$", text, re.MULTILINE):
        tag = re.search(r'(?:reused|source)="(\w+)"', tags)
        found[name, tag and tag.group(1)] = float(value)
    return found


def test_returning_users_are_in_the_metrics(service):
    """Ray exports them every few seconds; those of the tests above may be there already."""
    for _ in range(2):
        service.ask({"history": LIKED, "candidates": ["41", "42"]})
    end = time.monotonic() + 60
    contexts = {("collm_contexts_total", reused) for reused in ("whole", "none")}
    names = contexts | {("collm_context_hit_rate", None), ("collm_saved_milliseconds_total", None)}
    while not names <= (found := read_metrics(service.metrics_port)).keys():
        assert time.monotonic() < end, found
        time.sleep(1)
    assert min(found[name] for name in contexts) >= 1
    kept, computed = (found["collm_context_tokens_total", source] for source in ("kept", "computed"))
    assert found["collm_context_hit_rate", None] == pytest.approx(kept / (kept + computed))
    assert 0 < found["collm_kept_context_bytes", None] < 1 << 30
    assert found["collm_saved_milliseconds_total", None] > 0
    assert found["collm_requests_per_pass_count", None] >= 2


def test_it_stops_in_order(finished_run, service):
    """On SIGTERM the service answers received requests, exits and frees the port."""
    query = make_queries(finished_run)[0]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.ask, query)
        time.sleep(0.05)  # less than --batch-wait-ms
        service.process.send_signal(signal.SIGTERM)
        assert waiting.result()[0] == 200
    assert service.process.wait(60) == 0
    assert "stopping" in service.process.stdout.read()
    with pytest.raises(ConnectionRefusedError):
        service.ask(query)


def run_main(monkeypatch, *arguments):
    """Run the command in this process and return its exit code."""
    spec = importlib.util.spec_from_file_location("serve", ROOT / "launch" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["serve", *map(str, arguments)])
    return module.main()


def test_the_command_stops_before_anything_starts(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("collm_dist.orchestration.service.connect_ray", None)  # would fail if called
    config = finished_run / "config.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for more, code, message in (
            (["--port", taken.getsockname()[1]], 3, "cannot listen there (Address already in use)"),
            (["--host", "203.0.113.1"], 3, "cannot listen there"),
            (["--host", "0.0.0.0", "--port", "0"], 2, "Set COLLM_DIST_TOKEN to a token"),
            (["--port", "80x", "--max-batch-size", "0"], 2, "--max-batch-size 0: Input should be greater than"),
            ([f"run.dir={tmp_path}"], 2, "neither stage 2 nor stage 1 is done"),
            (["--events", finished_run / "events"], 2, "events must outlive the run"),
            (["llm.dtype=bfloat16"], 2, "config.llm.dtype: float32 -> bfloat16"),
        ):
            assert run_main(monkeypatch, "--config", config, *more) == code
            assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_model_ends_in_a_message(finished_run, tmp_path):
    """The replica finds the damage when it loads the model."""
    shutil.copytree(finished_run, tmp_path / "run")
    mapping = tmp_path / "run" / "stage2" / "mapping.safetensors"
    mapping.write_bytes(mapping.read_bytes()[:100])
    command = [sys.executable, "launch/serve.py", "--config", str(finished_run / "config.yaml"), "--port", "0"]
    command.append(f"run.dir={tmp_path / 'run'}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "mapping.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2, done.stdout + done.stderr
    assert "serving" not in done.stdout


@pytest.mark.slow
def test_two_models_share_the_requests_and_ctrl_c_stops_them(finished_run, recommender):
    """Ctrl-C sends SIGINT to every process of the terminal's group."""
    queries = make_queries(finished_run)
    with serving(finished_run, "--replicas", "2", "--max-batch-size", "1", "--shutdown-timeout-s", "20") as running:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(running.ask, queries))
        for query, (status, headers, answer) in zip(queries, found, strict=True):
            assert (status, headers["X-Scored-Together"]) == (200, "1")
            assert compare(answer, recommender.rank(**query)) < TOLERANCE
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 0


DEATH = ["--replicas", "2", "--max-waiting", "4", "--request-timeout-s", "30"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_death_of_a_model_is_hidden_or_answered_503(finished_run):
    """A replica is killed under load, and the other once the first is back: clients get JSON with 200, or 503."""
    found, is_over = [], threading.Event()
    query = {"history": LIKED, "num_retrieved": 60}

    def ask_on(running):
        while not is_over.is_set():
            status, headers, answer = running.ask(query)
            found.append((status, headers["content-type"], headers["Retry-After"], tuple(answer)))
            time.sleep(int(headers["Retry-After"] or 0))

    with serving(finished_run, *DEATH) as running, ThreadPoolExecutor(8) as pool:
        first = wait_for_replicas(running, 2)
        clients = [pool.submit(ask_on, running) for _ in range(8)]
        try:
            wait_for_answers(found, 20)
            first[0].kill()
            wait_for_answers(found, 20)
            wait_for_replicas(running, 2, without=first[:1])
            first[1].kill()
            wait_for_answers(found, 20)  # of the new replica
        finally:
            is_over.set()
        for client in clients:
            client.result()
        assert running.ask(query)[0] == 200
    counts = Counter(found)
    print(counts)
    ok = (200, "application/json", None, ("ranked", "warnings", "model"))
    assert counts[ok] >= 60
    assert set(counts) <= {ok, (503, "application/json", "1", ("detail",))}


def wait_for_replicas(running, number, without=(), patience_s=240):
    """Return the processes of that many replicas, once they run."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found = [
            process
            for process in psutil.Process(running.process.pid).children(recursive=True)
            if is_replica(process) and process not in without
        ]
        if len(found) == number:
            return found
        time.sleep(0.5)
    raise AssertionError(f"{len(found)} of {number} replicas run")


def is_replica(process):
    try:
        return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::ServeReplica")
    except psutil.Error:  # it has ended
        return False


def wait_for_answers(found, number):
    """Wait until so many further requests were answered 200."""
    start, deadline = len(found), time.monotonic() + 240
    while sum(status == 200 for status, *_ in found[start:]) < number:
        assert time.monotonic() < deadline, Counter(found)
        time.sleep(0.1)
