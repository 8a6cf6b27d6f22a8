"""A day in the life of a service: clients never stop while the next run is made and promoted, a model dies, and the
service is restarted. COLLM_DAY_REQUESTS=500 is a short day."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pyarrow.parquet as pq
import pytest

import collm_dist
from collm_dist import EventStore
from collm_dist.config.loader import load_config
from collm_dist.data.shards.interactions import load_interactions, load_item_table, load_user_ids
from collm_dist.runs.promotion import move_pointer
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.event_parts import list_read_parts
from collm_dist.serving.finished_run import build_recommender
from collm_dist.serving.requests import RankingQuery
from tests.conftest import REPOSITORY
from tests.integration.ranking_service import serving
from tests.integration.service_day import CLIENTS, DAWN, PATIENCE_S, Traffic, make_events
from tests.integration.test_serve import TOLERANCE, compare, wait_for_replicas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
REQUESTS = int(os.environ.get("COLLM_DAY_REQUESTS", "10000"))
EVENTS, USERS = max(REQUESTS // 5, 100), max(REQUESTS // 50, 20)
OPTIONS = ("--replicas", "2", "--follow-every-s", "1", "--request-timeout-s", "120")
# Parts every three seconds, and events that are deleted nine seconds after they came, if the runs in memory read them.
OPTIONS += ("--part-minutes", "0.05", "--keep-days", "0.0001")
DEATH, RESTART = "a model dies", "restart"
PASS = 64  # queries that the Python API answers at once


@pytest.fixture(scope="module")
def day(finished_run, tmp_path_factory):
    """Folder of the runs after the day, its traffic, and its events."""
    folder = tmp_path_factory.mktemp("day")
    shutil.copytree(finished_run, folder / "night-1")
    config = folder / "night-1" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished_run), str(folder / "night-1")))
    move_pointer(folder / "current", folder / "night-1")
    known, items = load_user_ids(finished_run / "data"), load_item_table(finished_run / "data")["item_id"]
    visitors = [f"visitor-{number}" for number in range(max(USERS - len(known), USERS // 2))]
    users = [*visitors, *known][:USERS]
    events = make_events(users, items, EVENTS)
    with ExitStack() as stack:

        def start(port):
            options = [*OPTIONS, "--events", folder / "events", "--port", port]
            return stack.enter_context(serving(folder / "current", *map(str, options)))

        traffic = Traffic(start(0), users, items, events)
        replicas = wait_for_replicas(traffic.service, 2)
        with traffic.flowing():
            live_through(traffic, folder, replicas, start)
        traffic.phase = "night"
        traffic.evening = [(query, ask(traffic.service, query)) for query in list_last_queries(users, items)]
        assert traffic.service.ask(None, path="/events/parts")[0] == 200
    run_night(folder, "night-3", "preprocess_data.py")
    for phase, count in sorted(traffic.count().items(), key=str):
        print(count, *phase)
    return folder, traffic, events


def live_through(traffic, folder, replicas, start):
    """Let the day pass, from the morning with night-1 to the evening with night-2."""
    traffic.reach(REQUESTS * 2 // 10, EVENTS * 4 // 10)
    assert traffic.service.ask(None, path="/events/parts")[0] == 200
    with ThreadPoolExecutor(1) as pool:
        night = pool.submit(run_night, folder, "night-2", "run_pipeline.py", "promotion.min_paired_difference=-1")
        traffic.reach(REQUESTS * 3 // 10, EVENTS * 5 // 10)
        traffic.phase = DEATH
        replicas[0].kill()
        traffic.reach(REQUESTS * 4 // 10, EVENTS * 6 // 10)
        wait_for_replicas(traffic.service, 2, without=replicas[:1], patience_s=PATIENCE_S)
        traffic.phase = "night"
        traffic.reach(REQUESTS * 5 // 10, EVENTS * 7 // 10, night.done)
        night.result()
    assert (folder / "current").resolve().name == "night-2"
    traffic.phase = "swap"
    new = read_model(folder / "night-2")
    traffic.reach(REQUESTS * 6 // 10, EVENTS * 8 // 10, lambda: traffic.list_models(50) == {new})
    traffic.phase = RESTART
    traffic.service.process.send_signal(signal.SIGTERM)
    assert traffic.service.process.wait(PATIENCE_S) == 0
    traffic.service = start(traffic.service.port)
    traffic.reach(REQUESTS * 8 // 10, EVENTS * 9 // 10)
    traffic.phase = "evening"
    traffic.reach(REQUESTS, EVENTS)


def run_night(folder, name, script, *more):
    """Run a command of docs/nightly.md."""
    command = [sys.executable, f"launch/{script}", "--config", str(folder / "current" / "config.yaml")]
    command += [f"run.dir={folder / name}", f"dataset.extend_from={folder / 'current'}"]
    command += [f"dataset.new_events={folder / 'events' / 'parquet'}", "stage1.refresh_every_days=30", *more]
    for _ in range(3):
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=3600)
        if done.returncode != 3:  # the machine may be too busy for another Ray to start in time
            break
    assert done.returncode == 0, done.stdout + done.stderr


def read_model(run):
    return json.loads((run / "stage2" / "summary.json").read_text())["content_hash"][:12]


def list_last_queries(users, items):
    return [{"user": user, "candidates": items[number % 40 :][:20]} for number, user in enumerate(users)]


def ask(service, query):
    status, _, answer = service.ask(query)
    assert status == 200, answer
    return answer


def rank_all(recommender, queries):
    """Return the rankings of the Python API."""
    found = []
    for start in range(0, len(queries), PASS):
        found += recommender.rank_many([RankingQuery(**query) for query in queries[start : start + PASS]])
    return found


def test_no_valid_request_fails(day):
    """Only the requests of a model that dies, and those at a service that stops, have to be sent again."""
    _, traffic, _ = day
    assert sum(one.status == 200 and "events" not in one.query for one in traffic.attempts) >= REQUESTS
    for one in traffic.attempts:
        if one.status == 503:
            assert one.headers == ("application/json", "1"), one
            assert list(one.answer) == ["detail"]
            assert "try again" in one.answer["detail"]
            assert {DEATH, RESTART} & set(one.phases), one
        elif one.status == 0:  # nobody listens
            assert RESTART in one.phases, one
        else:
            assert (one.status, one.headers) == (200, ("application/json", None)), one
    of_death = sum(one.status == 503 and DEATH in one.phases for one in traffic.attempts)
    assert of_death <= CLIENTS, "more than were in flight"


def test_answers_of_the_first_run_are_those_of_the_python_api(day):
    """Every answer whose ``as_of`` is known, with a store of the test's own that holds the day's events."""
    folder, traffic, events = day
    store = EventStore(folder / "expected")
    store.add(events)
    recommender = collm_dist.load_recommender(folder / "night-1", "cpu", events=store)
    check_answers(traffic, recommender, read_model(folder / "night-1"))


def test_answers_of_the_second_run_are_those_of_its_model_with_the_whole_log(day):
    """The same, and the evening's answers, with a log that holds the day's events, and without any store."""
    folder, traffic, _ = day
    shutil.copytree(folder / "night-2", folder / "mixed", ignore=shutil.ignore_patterns("data"))
    shutil.copytree(folder / "night-3" / "data", folder / "mixed" / "data")
    recommender = build_recommender(load_config(folder / "night-2" / "config.yaml"), RunDir(folder / "mixed"), "cpu")
    model = read_model(folder / "night-2")
    assert {answer["model"] for _, answer in traffic.evening} == {model}
    check_answers(traffic, recommender, model, traffic.evening)


def check_answers(traffic, recommender, model, more=()):
    given = [(one.query, one.answer) for one in traffic.attempts if "as_of" in one.query and one.status == 200]
    given = [(query, answer) for query, answer in [*given, *more] if answer["model"] == model]
    expected = rank_all(recommender, [query for query, _ in given])
    largest = max(compare(answer, one) for (_, answer), one in zip(given, expected, strict=True))
    print(len(given), "answers; largest difference", largest)
    assert largest < TOLERANCE


def test_no_event_is_lost_or_doubled_in_the_next_log(day):
    folder, traffic, events = day
    assert traffic.stored <= len(events) <= traffic.stored + traffic.duplicates
    data = folder / "night-3" / "data"
    log = load_interactions(data, ("user_idx", "item_idx", "timestamp", "label"))
    users, items = load_user_ids(data), load_item_table(data)["item_id"]
    fresh = log["timestamp"] >= DAWN
    rows = zip(*(log[name][fresh].tolist() for name in ("user_idx", "item_idx", "timestamp", "label")), strict=True)
    found = Counter((users[user], items[item], time, label) for user, item, time, label in rows)
    assert found == Counter((event.user, event.item, event.time, event.label) for event in events)
    before = load_interactions(folder / "night-1" / "data", ("label",))["label"]
    assert (~fresh).sum() == len(before)


def test_the_store_keeps_what_no_run_has_read(day):
    folder, _, events = day
    read = list_read_parts(RunDir(folder / "night-2"))
    names = sorted(path.name for path in (folder / "events" / "parquet").iterdir())
    assert names[: len(read)] == sorted(read)
    assert len(names) > len(read)
    rows = sum(pq.read_metadata(folder / "events" / "parquet" / name).num_rows for name in read)
    found = EventStore(folder / "events").read({event.user for event in events}).users.values()
    assert sum(map(len, found)) == len(events) - rows
