"""Owns the ceiling: a server that parses next to nothing and answers bytes it has ready.

    python -m benchmarks.ready    # prints its port

A GET is answered with one user, a POST with a batch of 1000. It shares no code with the service.
"""

from __future__ import annotations

import asyncio
from typing import cast

import uvloop

from benchmarks import documents

BATCH = 1000


def _answer(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", "Content-Type: application/json", *headers]
    # as many as the service sends
    lines += ["X-Request-ID: 0123456789abcdef0123456789abcdef", "Cache-Control: private, no-cache"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


class _Connection(asyncio.Protocol):
    """One connection; a request ends where its Content-Length says so."""

    def __init__(self, one: bytes, many: bytes) -> None:
        self._one = one
        self._many = many
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        while (end := received.find(b"\r\n\r\n")) >= 0:
            end += 4
            is_post = received.startswith(b"POST")
            if is_post:
                head = received[:end].lower()
                end += int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
                if len(received) < end:
                    break
            received = received[end:]
            assert self._transport is not None
            self._transport.write(self._many if is_post else self._one)
        self._received = received


async def _serve() -> None:
    one = _answer(documents.success(documents.encoded(0)), f"ETag: {documents.ETAG}")
    body = documents.batch(map(documents.encoded, range(BATCH)))
    many = _answer(body, f"X-Document-Tag: {documents.DOCUMENT_TAG}")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(one, many), "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
