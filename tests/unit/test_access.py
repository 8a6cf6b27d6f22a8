"""Access to the service: tokens, and requests per minute."""

import re

import pytest

from collm_dist.errors import RequestError
from collm_dist.serving import access
from collm_dist.serving.access import Access, check_token, hash_token

TOKEN = "0123456789abcdef"


def request(authorization=None, *, path="/rank", client="10.0.0.1"):
    headers = [] if authorization is None else [(b"authorization", authorization)]
    return {"path": path, "headers": headers, "client": (client, 5)}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    check_token(host, None)
    check_token(host, TOKEN)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "203.0.113.1"])
def test_other_addresses_need_a_token(host):
    with pytest.raises(RequestError, match=rf"--host {re.escape(host)}: .* Set COLLM_DIST_TOKEN to a token"):
        check_token(host, None)
    check_token(host, TOKEN)


@pytest.mark.parametrize("token", ["", "short", f"{TOKEN} 1", f"{TOKEN}\n", f"{TOKEN}é"])
def test_weak_tokens_are_refused(token):
    with pytest.raises(RequestError, match="COLLM_DIST_TOKEN: the token must have at least 16 ASCII characters"):
        check_token("127.0.0.1", token)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {TOKEN}".encode(), None),
        (f"bearer  {TOKEN}".encode(), None),
        (None, 401),
        (b"", 401),
        (b"Bearer", 401),
        (b"Bearer wrong", 401),
        (f"Basic {TOKEN}".encode(), 401),
        (f"Bearer {TOKEN}x".encode(), 401),
        (b"Bearer \xff\x00", 401),
    ],
)
def test_the_token_is_demanded(authorization, status):
    answer = Access(hash_token(TOKEN), None).refuse(request(authorization))
    assert (answer and answer.status_code) == status
    assert answer is None or answer.headers["www-authenticate"] == "Bearer"


def test_the_files_of_the_page_need_no_token_but_count():
    access = Access(hash_token(TOKEN), 2)
    assert [access.refuse(request(path=path)) for path in ("/", "/page.js")] == [None, None]
    assert access.refuse(request(path="/page.css")).status_code == 429
    access = Access(hash_token(TOKEN), None)
    for path in ("/items", "/compare", "/docs", "/openapi.json", "//", "/page.js/", "/page.js/../items", ""):
        assert access.refuse(request(path=path)).status_code == 401, path


def test_probes_need_no_token():
    assert Access(hash_token(TOKEN), 1).refuse(request(path="/healthz")) is None


def test_each_address_has_its_own_allowance(monkeypatch):
    now = 100.0
    monkeypatch.setattr(access.time, "monotonic", lambda: now)
    guard = Access(None, 3)
    assert [guard.refuse(request()) for _ in range(3)] == [None] * 3
    answer = guard.refuse(request())
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "20")
    assert guard.refuse(request(client="10.0.0.2")) is None
    assert guard.refuse(request(path="/healthz")) is None
    now = 120.0  # a third of a minute later there is room for one
    assert guard.refuse(request()) is None
    assert guard.refuse(request()).status_code == 429


def test_the_list_of_addresses_does_not_grow_without_end(monkeypatch):
    now = 100.0
    monkeypatch.setattr(access.time, "monotonic", lambda: now)
    monkeypatch.setattr(access, "_MAX_CLIENTS", 5)
    guard = Access(None, 60)
    for number in range(50):
        now += 1
        assert guard.refuse(request(client=str(number))) is None
        assert len(guard._whole_at) <= 6
    for _ in range(60):
        guard.refuse(request(client="busy"))
    for number in range(50):  # at once: no allowance is whole again
        assert guard.refuse(request(client=f"new {number}")) is None
        assert len(guard._whole_at) <= 6
    assert guard.refuse(request(client="busy")).status_code == 429


@pytest.mark.parametrize(
    ("host", "is_refused"),
    [(None, False), ("localhost:8000", False), ("LOCALHOST", False), ("127.0.0.1:8000", False), ("[::1]:8000", False),
     ("evil.example", True), ("localhost.evil.example:8000", True), ("127.0.0.1.evil.example", True), ("", True)],
)  # fmt: skip
def test_without_a_token_other_names_are_refused(host, is_refused):
    asked = request()
    asked["headers"] += [] if host is None else [(b"host", host.encode())]
    found = Access(None, None).refuse(asked)
    assert (found is not None) == is_refused
    if found is not None:
        assert (found.status_code, "is not this machine" in found.body.decode()) == (403, True)
    asked["headers"].append((b"authorization", f"Bearer {TOKEN}".encode()))
    assert Access(hash_token(TOKEN), None).refuse(asked) is None
