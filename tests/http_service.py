"""A real HTTP server on the loopback, in a thread, that answers as a test says: rightly, wrongly, or not at all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What goes over the wire.

    Attributes:
        body: JSON, or raw bytes.
        sent: bytes of it that are sent before the connection is closed; None: all.
        pause_s: before each byte.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    sent: int | None = None
    pause_s: float = 0.0


@dataclass
class Service:
    """A running server: what it was asked, and the most requests that it had at once.

    Attributes:
        about: path → JSON that it says of itself, not counted among what it was asked; a function: of the body.
    """

    url: str
    about: dict[str, Any] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Reply], port: int = 0) -> Iterator[Service]:
    """A server whose reply is `answer(body, how many requests came before)`; at any port that is free, or this."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.give(Reply(service.about.get(self.path), status=200 if self.path in service.about else 404))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                said = service.about.get(self.path)
                return self.give(Reply(said and said(body), status=200 if said else 404))
            with lock:
                before = len(service.asked)
                service.asked.append({"path": self.path, **body})
                service.headers.append(dict(self.headers))
                service.open += 1
                service.most_open = max(service.most_open, service.open)
            try:
                self.give(answer(body, before))
            finally:
                with lock:
                    service.open -= 1

        def give(self, reply: Reply) -> None:
            raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(raw)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # who asked may have gone away
                if reply.pause_s:
                    for byte in raw:
                        time.sleep(reply.pause_s)
                        self.wfile.write(bytes([byte]))
                else:
                    self.wfile.write(raw[: reply.sent])
            self.close_connection = reply.sent is not None or bool(reply.pause_s)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    service = Service(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
