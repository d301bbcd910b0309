"""Small HTTP servers on loopback for the tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests


class Recorder(BaseHTTPRequestHandler):
    """Keeps what was asked, and answers as `server.answer` says."""

    def do_GET(self) -> None:
        self.body = self.read_body()
        self.server.asked.append((self.command, self.path, dict(self.headers), self.body))  # type: ignore[attr-defined]
        self.server.answer(self)  # type: ignore[attr-defined]

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(answer: Any) -> Iterator[tuple[str, list[Any]]]:
    """A server on loopback; its address and what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.daemon_threads, server.answer, server.asked = True, answer, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


def reply(handler: Any, status: int, body: bytes = b"{}", **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def proxied(behind: str, rule: Callable[[str, str], int]) -> Iterator[str]:
    """A proxy in front of a server: its address. `rule` gets a method and a path; 0 passes the request on."""

    def answer(handler: Any) -> None:
        if status := rule(handler.command, handler.path):
            reply(handler, status, b"<html>a proxy's page</html>")
            return
        dropped = ("host", "connection", "content-length", "transfer-encoding")
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in dropped}
        found = requests.request(handler.command, behind + handler.path, headers=headers, data=handler.body, timeout=60)
        reply(handler, found.status_code, found.content, Content_Type=found.headers.get("Content-Type", ""))

    with served(answer) as (address, _):
        yield address
