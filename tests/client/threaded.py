"""A small service in threads, for clients whose event loops come and go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil

from tests.client.conftest import ETAG, USER, envelope

READY = (
    b"event: ready\nid: e.1\n"
    b'data: {"now":"2026-01-01T00:00:00Z","through":"2026-01-01T00:00:00Z"}\n\n'
)


class ThreadedService:
    """Answers every read with the user of the id that was asked for.

    Of an id that begins with `slow-`, it answers when it is `let_go`.
    """

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._port = int(server.server_address[1])
        self.let_go = threading.Event()
        self.streams = 0
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def connections(self) -> int:
        """How many connections to it this process holds."""
        return sum(
            bool(held.raddr) and held.raddr.port == self._port
            for held in psutil.Process().net_connections("tcp4")
            if held.status == psutil.CONN_ESTABLISHED
        )


class _Listener(ThreadingHTTPServer):
    # Where five may wait, as usual, connections beyond them are tried again only after a second.
    request_queue_size = 128
    daemon_threads = True
    block_on_close = False


@contextmanager
def threaded_service() -> Iterator[ThreadedService]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            _, _, user_id = self.path.rpartition("/")
            service.asked.append(user_id)
            if user_id == "stream":
                self._stream()
                return
            if user_id.startswith("slow-"):
                service.let_go.wait(20)
            self._answer(envelope({**USER, "id": user_id}))

        def do_DELETE(self) -> None:
            self.do_GET()

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("ETag", ETAG)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(READY)
            self.wfile.flush()
            service.streams += 1
            with suppress(OSError):
                self.connection.recv(1)  # until the client has gone
            service.streams -= 1
            self.close_connection = True

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client has gone
                super().handle()

        def finish(self) -> None:
            with suppress(OSError):
                super().finish()

        def log_request(self, *_: object) -> None:
            """Stay silent."""

    with _Listener(("127.0.0.1", 0), Handler) as server:
        service = ThreadedService(server)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield service
        finally:
            service.let_go.set()
            server.shutdown()
            thread.join()
