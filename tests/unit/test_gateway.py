"""The gateway without Ray: repeated requests, JSON for every error, slow clients."""

import asyncio
import json
import time

import pytest
import uvicorn
import uvicorn.protocols.http.auto
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from collm_dist.serving.access import Access, hash_token
from collm_dist.serving.gateway import Gateway, build_environment
from collm_dist.serving.header_time import limit_header_time
from collm_dist.serving.service_options import ServiceOptions

LIMITS = {"access": Access(None, None), "receive_timeout_s": 0.1, "request_timeout_s": 1.0, "max_body_kib": 1}
OK = (200, b"application/json", b'{"ranked": []}')


class Proxy:
    """Application that fails as Ray Serve's proxy does: an answer in plain text, part of an answer, or none."""

    def __init__(self, *answers):
        self.answers, self.seen, self.headers = list(answers), [], {}

    async def __call__(self, scope, receive, send):
        self.seen.append((await receive())["body"])
        self.headers = dict(scope["headers"])
        answer = self.answers.pop(0)
        if answer == "disconnect":
            assert (await receive())["type"] == "http.disconnect"
            return
        if answer is None:
            return
        status, kind, body = answer[:3]
        headers = [(b"content-type", kind), *answer[3:]]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if body is not None:
            await send({"type": "http.response.body", "body": body, "more_body": False})


def ask(proxy, *pieces, headers=()):
    """Return the messages that the server gets for a request whose body comes in pieces; None = nothing comes."""
    unread, sent = list(pieces or [b"{}"]), []

    async def receive():
        if not unread:
            return {"type": "http.disconnect"}
        piece = unread.pop(0)
        if piece is None:
            await asyncio.sleep(10)
        return {"type": "http.request", "body": piece, "more_body": bool(unread)}

    async def send(message):
        sent.append(message)

    asyncio.run(Gateway(proxy, **LIMITS)({"type": "http", "path": "/rank", "headers": list(headers)}, receive, send))
    return sent


def read(sent):
    """Return status, headers and decoded body of an answer."""
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


def test_an_answer_passes_unchanged():
    proxy = Proxy(OK)
    sent = ask(proxy, b"{", b"}")
    assert (sent[0]["status"], sent[1]["body"]) == (200, OK[2])
    assert proxy.seen == [b"{}"]


@pytest.mark.parametrize("failure", [None, (200, b"application/json", None)])
def test_a_request_whose_replica_died_is_asked_again(failure):
    proxy = Proxy(failure, OK)
    assert read(ask(proxy, b"{}"))[0] == 200
    assert proxy.seen == [b"{}", b"{}"]


def test_the_second_death_is_told():
    proxy = Proxy(None, None, OK)
    status, headers, answer = read(ask(proxy))
    assert (status, headers[b"retry-after"], len(proxy.seen)) == (503, b"1", 2)
    assert "try again" in answer["detail"]


def test_who_left_is_not_asked_for_again():
    proxy = Proxy("disconnect", OK)
    assert ask(proxy) == []
    assert len(proxy.answers) == 1


@pytest.mark.parametrize(
    ("answer", "status", "retry_after", "message"),
    [
        ((408, b"text/plain", b"Request x timed out"), 503, b"1", "no model was free within 1 s"),
        ((404, b"text/plain; charset=utf-8", b"Path '/rank' not found."), 503, b"1", "starting, stopping or"),
        ((503, b"text/plain", b"Too many requests", (b"retry-after", b"7")), 503, b"7", "starting, stopping or"),
        ((422, b"application/json", b'{"detail": "top_k"}'), 422, None, "top_k"),
    ],
)
def test_errors_in_plain_text_become_json(answer, status, retry_after, message):
    found, headers, body = read(ask(Proxy(answer)))
    assert (found, headers.get(b"retry-after")) == (status, retry_after)
    assert headers[b"content-type"] == b"application/json"
    assert message in body["detail"]


def test_clients_do_not_set_serves_limits():
    proxy = Proxy(OK)
    names = (b"x-request-disconnect-disabled", b"x-request-id", b"serve_multiplexed_model_id", b"x-session-id")
    ask(proxy, headers=[(b"x-request-timeout-seconds", b"9999"), *((name, b"\xff") for name in names)])
    assert proxy.headers.keys() == {b"x-request-timeout-seconds"}
    assert float(proxy.headers[b"x-request-timeout-seconds"]) <= 1


def test_web_sockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Gateway(None, **LIMITS)({"type": "websocket", "path": "/rank", "headers": []}, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_clients_do_not_choose_their_address(monkeypatch):
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    trusted = build_environment(ServiceOptions(max_history=1, max_candidates=1), None)["FORWARDED_ALLOW_IPS"]
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["client"][0])

    scope = {"type": "http", "client": ("127.0.0.1", 5), "headers": [(b"x-forwarded-for", b"203.0.113.9")]}
    asyncio.run(ProxyHeadersMiddleware(app, trusted)(scope, None, None))
    assert seen == ["127.0.0.1"]


def test_without_the_token_nothing_is_read_or_forwarded(monkeypatch):
    monkeypatch.setitem(LIMITS, "access", Access(hash_token("secret" * 4), None))
    proxy = Proxy(OK)
    status, headers, _ = read(ask(proxy, None))
    assert (status, headers[b"www-authenticate"], proxy.seen) == (401, b"Bearer", [])
    assert read(ask(proxy, headers=[(b"authorization", b"Bearer " + b"secret" * 4)]))[0] == 200


def test_a_slow_body_is_cut_off():
    proxy = Proxy(OK)
    status, headers, answer = read(ask(proxy, b"{", None))
    assert (status, headers[b"connection"], proxy.seen) == (408, b"close", [])
    assert "the body did not arrive within 0.1 s" in answer["detail"]


async def _send_slowly(port, *pieces):
    """Send pieces, 0.05 s apart; return what the server sends until it closes the connection, and the seconds taken."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.perf_counter()
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.05)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return answer, time.perf_counter() - started


def test_slow_headers_are_cut_off(monkeypatch):
    """On a real server: a request that trickles in is ended, however often the client sends a byte; others are not."""

    async def app(scope, receive, send):
        await asyncio.sleep(0.5)  # longer than the limit for headers
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run():
        monkeypatch.setattr(
            uvicorn.protocols.http.auto, "AutoHTTPProtocol", uvicorn.protocols.http.auto.AutoHTTPProtocol
        )
        limit_header_time(0.3)
        server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        found = await asyncio.gather(
            _send_slowly(port),
            _send_slowly(port, b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 5),
            _send_slowly(port, request),
        )
        server.should_exit = True
        await task
        return found

    (silent, _), (slow, took_s), (quick, _) = asyncio.run(run())
    for answer in (silent, slow):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert "the headers did not arrive within 0.3 s" in json.loads(body)["detail"]
    assert took_s < 2
    assert quick.startswith(b"HTTP/1.1 204")
