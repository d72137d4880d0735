"""An HTTP proxy in front of a real engine, which fails on request and passes everything else on."""

import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Failure = Literal["status 500", "status 400", "connection cut", "no answer"]
LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class GenerateCall:
    """A request that reached the proxy."""

    at: float
    """On the monotonic clock."""
    body: dict[str, Any]


class FailingProxy:
    """Fails the first calls of `/generate`, one after the other, and passes other requests on. A context manager."""

    def __init__(self, engine_url: str, *failures: Failure) -> None:
        self.calls: list[GenerateCall] = []
        self._engine_url = engine_url
        self._failures = list(failures)
        self._closed = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy._pass_on(self, None)

            def do_POST(self) -> None:
                proxy._post(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing is printed."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> "FailingProxy":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def is_closed(self) -> bool:
        """The client has closed the connection."""
        return self._closed.is_set()

    def _post(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if handler.path != "/generate":
            self._pass_on(handler, body)
            return
        self.calls.append(GenerateCall(time.monotonic(), json.loads(body)))
        match self._failures.pop(0) if self._failures else None:
            case "status 500":
                self._answer(handler, 500, "text/plain", b"out of order")
            case "status 400":
                self._answer(handler, 400, "text/plain", b"not like this")
            case "connection cut":
                handler.close_connection = True  # without an answer
            case "no answer":
                self._closed.wait(LIMIT_SECONDS)
            case None:
                self._pass_on(handler, body)

    def _pass_on(self, handler: BaseHTTPRequestHandler, body: bytes | None) -> None:
        headers = {"Content-Type": handler.headers.get("Content-Type", "application/json")}
        headers["Authorization"] = handler.headers.get("Authorization", "")
        request = urllib.request.Request(self._engine_url + handler.path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_SECONDS) as answer:
                self._answer(handler, answer.status, answer.headers.get_content_type(), answer.read())
        except urllib.error.HTTPError as error:
            self._answer(handler, error.code, error.headers.get_content_type(), error.read())

    @staticmethod
    def _answer(handler: BaseHTTPRequestHandler, status: int, content_type: str, body: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
