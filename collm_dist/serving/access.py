"""Access to the service: a bearer token, and a limit on the requests of each client address."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import re
import socket
import time
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Scope

from collm_dist.errors import RequestError
from collm_dist.serving.http_errors import answer_error
from collm_dist.serving.web_page import FILES

ACCESS_VARIABLE = "COLLM_DIST_TOKEN"
_MIN_TOKEN = 16
# Probes of load balancers have no token; the answer tells nothing about users.
_OPEN_PATHS = ("/healthz", "/-/healthz")
_MAX_CLIENTS = 10_000


def check_token(host: str, token: str | None) -> None:
    """Check the token of a service that listens on an address.

    Raises:
        RequestError: the token is missing on an address other than loopback, or too short, or has other characters
            than an HTTP header may have.
    """
    advice = "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"
    if token is None:
        if not _is_loopback(host):
            raise RequestError(
                f"--host {host}: the service would be open to the network. Set {ACCESS_VARIABLE} to a token that "
                f"clients must send ({advice}), or leave --host at 127.0.0.1"
            )
    elif len(token) < _MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise RequestError(
            f"{ACCESS_VARIABLE}: the token must have at least {_MIN_TOKEN} ASCII characters and no blanks; {advice}"
        )


def hash_token(token: str) -> str:
    """Return the SHA-256 digest of a token, in hexadecimal."""
    return hashlib.sha256(token.encode("latin-1", errors="replace")).hexdigest()


class Access:
    """Decision on each request by its token and by the number of requests of its client address.

    The files of the page need no token: they are the same for every run, and the page asks its reader for the token.
    """

    def __init__(self, token_hash: str | None, max_requests_per_minute: int | None) -> None:
        """Store what is required; None = nothing.

        Args:
            token_hash: ``hash_token`` of the token.
            max_requests_per_minute: requests per client address, at once or spread over a minute.
        """
        self._token_hash, self._per_minute = token_hash, max_requests_per_minute
        # Time at which the allowance of a client is whole again, by address.
        self._whole_at: dict[str, float] = {}

    def refuse(self, scope: Scope) -> Response | None:
        """Return the error that answers a request, or None to let it through."""
        if scope["path"] in _OPEN_PATHS:
            return None
        wait_s = self._count(scope["client"][0] if scope.get("client") else "")
        if wait_s > 0:
            headers = {"Retry-After": str(math.ceil(wait_s))}
            return answer_error(429, f"more than {self._per_minute} requests per minute from this address", headers)
        if self._token_hash is None:
            return _refuse_other_host(scope)
        if scope["path"] in FILES:
            return None
        kind, _, token = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
        # Digests of equal length: the time of the comparison tells nothing about the token.
        if kind.lower() == "bearer" and hmac.compare_digest(hash_token(token.strip()), self._token_hash):
            return None
        return answer_error(
            401, "authorization: send the header 'Authorization: Bearer TOKEN'", {"WWW-Authenticate": "Bearer"}
        )

    def _count(self, client: str) -> float:
        """Count a request, and return 0; or the seconds after which the client may send it."""
        if self._per_minute is None:
            return 0.0
        now, cost_s = time.monotonic(), 60 / self._per_minute
        whole_at = max(self._whole_at.get(client, now), now)
        if whole_at + cost_s - now > 60 + 1e-6:
            return whole_at + cost_s - now - 60
        if len(self._whole_at) >= _MAX_CLIENTS:  # those with most of their allowance left are forgotten
            busiest = sorted(self._whole_at, key=self._whole_at.__getitem__)[_MAX_CLIENTS // 2 :]
            self._whole_at = {name: self._whole_at[name] for name in busiest}
        self._whole_at[client] = whole_at + cost_s
        return 0.0


def _refuse_other_host(scope: Scope) -> Response | None:
    """Return an error if a request names another host than this machine.

    Without a token the service listens on loopback. A web page could make its own name lead there (DNS rebinding), and
    then read the answers.
    """
    host = dict(scope["headers"]).get(b"host", b"localhost").decode("latin-1").lower()
    name = re.sub(r":\d*$", "", host).strip("[]")
    with suppress(ValueError):
        ipaddress.ip_address(name)  # no name, so nobody else's
        return None
    if name == "localhost" or name.endswith(".localhost"):
        return None
    return answer_error(
        403,
        f"host: '{host:.100}' is not this machine. Without a token the service answers to localhost alone: set "
        f"{ACCESS_VARIABLE}, or let a proxy in front send 'Host: localhost'",
    )


def _is_loopback(host: str) -> bool:
    addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
