"""A day of clients: users who ask for rankings and report events, at bounded concurrency, until each has its answer.

Event number n happens n seconds after ``DAWN``, and batches are numbered in the order of their times. A request names
as its ``as_of`` the end of the last batch before which all are acknowledged, so that its answer does not depend on the
batches that are on their way.
"""

import http.client
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from collm_dist import Event

DAWN = 1_030_000_000  # after the log
BATCH = 10
RANK_CLIENTS, EVENT_CLIENTS = 6, 2
CLIENTS = RANK_CLIENTS + EVENT_CLIENTS
# Between requests of a client that has sent its share and goes on until something else is over.
PAUSE_S = 1.0
PATIENCE_S = 1200


@dataclass(frozen=True)
class Attempt:
    """A request that was sent once.

    Attributes:
        query: the body.
        phases: what was happening when it was sent and when it was answered.
        status: of the answer; 0 = the connection was refused or reset.
        headers: content type and Retry-After.
        answer: the decoded body.
    """

    query: dict
    phases: tuple[str, str]
    status: int
    headers: tuple[str | None, str | None]
    answer: dict


def make_events(users, items, count):
    """Return events of the users in the order of their times, the first of each user early in the day."""
    chance = random.Random(11)
    return [
        Event(
            f"click-{number}",
            users[number % len(users)] if number < 2 * len(users) else chance.choice(users),
            chance.choice(items),
            DAWN + number,
            int(chance.random() < 0.6),
        )
        for number in range(count)
    ]


class Traffic:
    """Clients in threads. ``service`` may be replaced, and ``phase`` changed, at any time.

    Attributes:
        attempts: all requests so far, in the order of their answers.
        stored: number of events that the service said it has stored; duplicates: that it had already.
    """

    def __init__(self, service, users, items, events):
        self.service, self.phase, self.attempts = service, "day", []
        self.stored, self.duplicates, self.troubles = 0, 0, []
        self._users, self._items = users, items
        self._batches = [events[start : start + BATCH] for start in range(0, len(events), BATCH)]
        self._taken, self._acknowledged, self._known = 0, set(), 0
        self._allowed = {"requests": 0, "events": 0}
        self._answered = 0
        self._lock, self._is_over = threading.Lock(), threading.Event()

    @contextmanager
    def flowing(self):
        """Run the clients during the block; an error of one of them ends it."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._ask_on, seed) for seed in range(RANK_CLIENTS)]
            clients += [pool.submit(self._send_on, seed) for seed in range(EVENT_CLIENTS)]
            try:
                yield
            finally:
                self._is_over.set()
            for client in clients:
                client.result()

    def reach(self, requests, events, meanwhile=lambda: True):
        """Wait until so many requests are answered and events acknowledged in all, and ``meanwhile`` holds."""
        self._allowed = {"requests": requests, "events": -(-events // BATCH)}
        end = time.monotonic() + PATIENCE_S + requests / 5
        while self._answered < requests or self._known < self._allowed["events"] or not meanwhile():
            assert not self.troubles, self.troubles
            assert time.monotonic() < end, (self.phase, self._answered, self._known, self.count())
            time.sleep(0.1)

    def count(self):
        """Return the number of attempts by status, headers and the phase of their answers."""
        return Counter((one.status, *one.headers, one.phases[1]) for one in self.attempts)

    def list_models(self, number):
        """Return the models that gave the last answers."""
        return {one.answer["model"] for one in self.attempts[-number:] if "model" in one.answer}

    def _ask_on(self, seed):
        chance = random.Random(seed)
        while not self._is_over.is_set():
            if self._answered >= self._allowed["requests"]:
                time.sleep(PAUSE_S)
            self._insist(self._make_query(chance), "/rank")
            with self._lock:
                self._answered += 1

    def _make_query(self, chance):
        as_of = DAWN + BATCH * self._known
        user, kind = chance.choice(self._users), chance.random()
        if kind < 0.5:
            return {"user": user, "candidates": chance.sample(self._items, 5), "as_of": as_of}
        if kind < 0.6:
            return {"user": user, "num_retrieved": 5, "as_of": as_of}
        if kind < 0.7:
            history = chance.sample(self._items, 4)
            query = {"history": history, "history_labels": [1, 0, 1, 1], "as_of": as_of}
            return query | {"candidates": chance.sample(self._items, 5)}
        return {"user": user, "candidates": chance.sample(self._items, 5)}  # with whatever has happened by then

    def _send_on(self, seed):
        chance = random.Random(100 + seed)
        while not self._is_over.is_set():
            with self._lock:
                number = self._taken
                self._taken += (has_work := number < self._allowed["events"])
            if not has_work:
                time.sleep(PAUSE_S)
                continue
            rows = [
                {"event_id": event.event_id, "user": event.user, "item": event.item, "time": event.time}
                | {"label": "like" if event.label else "dislike"}
                for event in self._batches[number]
            ]
            for _ in range(1 + (chance.random() < 0.1)):  # some clients miss an answer and send again
                answer = self._insist({"events": rows}, "/events")
                with self._lock:
                    self.stored += answer["stored"]
                    self.duplicates += answer["duplicates"]
            with self._lock:
                self._acknowledged.add(number)
                while self._known in self._acknowledged:
                    self._known += 1

    def _insist(self, body, path):
        """Send a request until it is answered 200, as docs/serving.md tells clients to, and return the answer."""
        end = time.monotonic() + PATIENCE_S
        while True:
            phase = self.phase
            try:
                status, headers, answer = self.service.ask(body, path=path)
                told = headers["content-type"], headers["Retry-After"]
            except (OSError, http.client.HTTPException) as error:
                status, told, answer = 0, (type(error).__name__, None), {}
            self.attempts.append(Attempt(body, (phase, self.phase), status, told, answer))
            if status == 200:
                return answer
            if status not in (0, 503) or time.monotonic() > end:
                self.troubles.append((phase, status, answer))
                raise AssertionError(self.troubles)
            time.sleep(float(told[1] or 1))
