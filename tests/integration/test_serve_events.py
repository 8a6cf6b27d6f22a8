"""A service that receives events and follows a link: nothing is lost or doubled, whatever dies or is promoted."""

import json
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

import collm_dist
from collm_dist import Event, EventStore
from collm_dist.data.shards.interactions import load_user_ids
from collm_dist.runs.promotion import move_pointer
from tests.integration.test_serve import TOLERANCE, compare, serving

CANDIDATES = [str(number) for number in range(30, 60)]


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory):
    """Folder with the finished run as ``one``, the same without stage 2 as ``two``, and ``damaged``; ``current`` leads
    to ``one``."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished_run, folder / "one")
    shutil.copytree(finished_run, folder / "two", ignore=shutil.ignore_patterns("stage2", "eval"))
    shutil.copytree(finished_run, folder / "damaged")
    mapping = folder / "damaged" / "stage2" / "mapping.safetensors"
    mapping.write_bytes(mapping.read_bytes()[:-8] + bytes(8))
    move_pointer(folder / "current", folder / "one")
    return folder


def start(folder, *options):
    options = [f"run.dir={folder / 'current'}", "--events", folder / "events", "--accept-stage-1", *options]
    return serving(folder / "one", "--follow-every-s", "0.5", "--request-timeout-s", "120", *map(str, options))


def send(service, *events):
    names = ("event_id", "user", "item", "time", "label")
    return service.ask({"events": [dict(zip(names, event, strict=False)) for event in events]}, path="/events")


def ask(service, user):
    status, _, answer = service.ask({"user": user, "candidates": CANDIDATES})
    assert status == 200, answer
    return answer


def ask_patiently(service, user):
    """Ask until the only replica has loaded its model again."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with suppress(TimeoutError):
            status, _, answer = service.ask({"user": user, "candidates": CANDIDATES})
            if status == 200:
                return answer
            assert status == 503, answer
            time.sleep(1)
    raise AssertionError("no replica came back")


def wait_for(service, condition):
    deadline = time.monotonic() + 240
    while not condition(health := service.ask(None, method="GET", path="/healthz")[2]):
        assert time.monotonic() < deadline, health
        time.sleep(0.3)
    return health


def kill_process(service, name):
    """Kill a process of the service by the name that Ray gives it."""
    for process in psutil.Process(service.process.pid).children(recursive=True):
        if name in " ".join(process.cmdline()):
            process.kill()
            return
    raise AssertionError(f"there is no process {name}")


@pytest.mark.slow
def test_events_count_from_the_next_ranking_on(folder):
    user, other = load_user_ids(folder / "one" / "data")[:2]
    events = [("1", user, "3", 1_030_000_000, "like"), ("2", user, 17, 1_030_000_001, "dislike")]
    with start(folder) as service:
        before, before_other = ask(service, user), ask(service, other)
        status, _, answer = send(service, *events, ("3", "new", "no such item", 5, "like"))
        assert (status, answer) == (200, {"stored": 3, "duplicates": 0, "unknown_items": ["no such item"]})
        assert send(service, *events)[2] == {"stored": 0, "duplicates": 2, "unknown_items": []}
        after = ask(service, user)
        ours = collm_dist.load_recommender(folder / "one", "cpu", events=EventStore(folder / "events"))
        assert compare(after, ours.rank(user=user, candidates=CANDIDATES)) < TOLERANCE
        assert after["ranked"] != before["ranked"]
        assert compare(ask(service, other), ours.rank(user=other, candidates=CANDIDATES)) < TOLERANCE
        assert before_other["ranked"]
        for event, message in (
            (("1", user, "4", 5, "like"), "events.0.event_id: '1' was received before with another"),
            (("9", user, "4", 5), "events.0.label: is missing; send 'like' or 'dislike'"),
            (("9", user, "4", 5, "love"), "events.0.label: 'love' Input should be 'like' or 'dislike'"),
            (("9", user, "4"), "events.0.time: is missing"),
            (("9", " x", "4", 5, "like"), "events.0.user: ' x' would be read as 'x' in a log"),
        ):
            status, _, answer = send(service, event)
            assert (status, answer["detail"][: len(message)]) == (422, message)
        for body, message in (
            ({"events": []}, "events: the list is empty"),
            ({"events": [7]}, "events.0: 7 is not a JSON object"),
            ({"events": [{"colour": 1}]}, "events.0.event_id: is missing"),
            ([], 'body: not a JSON object; send an object such as {"events"'),
        ):
            status, _, answer = service.ask(body, path="/events")
            assert (status, answer["detail"][: len(message)]) == (422, message)
        # The store's process dies: a call waits until Ray has started it again.
        kill_process(service, "_EventActor")
        assert send(service, ("4", user, "25", 1_030_000_002, "like"))[2]["stored"] == 1
        kill_process(service, "ServeReplica")
        expected = ours.rank(user=user, candidates=CANDIDATES)
        assert compare(ask_patiently(service, user), expected) < TOLERANCE
        status, _, answer = service.ask(None, path="/events/parts")
        assert (status, len(answer["parts"])) == (200, 1)
        assert (folder / "events" / "parquet" / answer["parts"][0]).exists()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(120) == 0


@pytest.mark.slow
def test_a_promoted_run_takes_over_without_a_failed_request(folder):
    """Requests never stop while a damaged run, and then another run, is promoted."""
    EventStore(folder / "events").add([Event("swap", "newcomer", "41", 1_030_000_000)])
    ours = {
        name: collm_dist.load_recommender(
            folder / name, "cpu", accept_stage1=True, events=EventStore(folder / "events")
        ).rank(user="newcomer", candidates=CANDIDATES)
        for name in ("one", "two")
    }
    found, stop = [], threading.Event()

    def keep_asking(service):
        while not stop.is_set():
            found.append(service.ask({"user": "newcomer", "candidates": CANDIDATES})[::2])

    with start(folder) as service, ThreadPoolExecutor(3) as pool:
        first = wait_for(service, lambda health: health["run"] == "one")
        assert first["refused"] is None
        assert first["follows"] == "current"
        try:
            for _ in range(3):
                pool.submit(keep_asking, service)
            move_pointer(folder / "current", folder / "damaged")
            health = wait_for(service, lambda health: health["refused"])
            assert (health["run"], health["model"], health["since"]) == ("one", first["model"], first["since"])
            assert health["refused"]["run"] == "damaged"
            assert "damaged/stage2/mapping.safetensors" in health["refused"]["reason"]
            assert str(folder) not in str(health)
            move_pointer(folder / "current", folder / "two")
            second = wait_for(service, lambda health: health["run"] == "two")
            assert (second["refused"], second["stage"]) == (None, "stage1")
            count = len(found)
            while len(found) < count + 10:
                time.sleep(0.1)
        finally:
            stop.set()
    assert {status for status, _ in found} == {200}
    models = {first["model"]: ours["one"], second["model"]: ours["two"]}
    print(len(found), "requests", {model: sum(model == answer["model"] for _, answer in found) for model in models})
    assert {answer["model"] for _, answer in found} == set(models)
    assert max(compare(answer, models[answer["model"]]) for _, answer in found) < TOLERANCE


@pytest.mark.slow
def test_the_first_line_names_the_run_that_serves(folder):
    """The link leads to a damaged run; the run that took over last serves."""
    (folder / ".current.served.json").write_text(json.dumps({"run": str(folder / "one")}))
    move_pointer(folder / "current", folder / "damaged")
    with start(folder) as service:
        health = service.ask(None, method="GET", path="/healthz")[2]
    assert health["run"] == "one"
    assert service.line.startswith(f"serving one (stage2 {health['model']}) with 1 model(s) at http://")
    assert "current, whose run damaged cannot be served: damaged/stage2/mapping.safetensors" in service.line
