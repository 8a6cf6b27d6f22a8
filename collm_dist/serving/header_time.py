"""Time limit for request headers, in uvicorn's HTTP protocol."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn.protocols.http.auto

from collm_dist.serving.http_errors import answer_slow


def limit_header_time(limit_s: float) -> None:
    """Let uvicorn servers that start later in this process close connections whose headers arrive too slowly.

    Uvicorn has no such option, and Serve no option for another protocol class.
    """
    base: Any = uvicorn.protocols.http.auto.AutoHTTPProtocol

    class ImpatientProtocol(base):  # type: ignore[misc]
        """HTTP protocol with a time limit for request headers."""

        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            self._unwatch()

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self._header_timer is None:
                self._header_timer = self.loop.call_later(limit_s, self._close)

        def _unwatch(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _close(self) -> None:
            answer = answer_slow(f"the headers did not arrive within {limit_s:g} s")
            lines = [b"HTTP/1.1 408 Request Timeout", *(name + b": " + value for name, value in answer.raw_headers)]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
            self.transport.close()

    uvicorn.protocols.http.auto.AutoHTTPProtocol = ImpatientProtocol
