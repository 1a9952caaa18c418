"""An OpenAI-compatible server on loopback that prefers the answer with more words "w1", and misbehaves when told to."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def prefers(question: str) -> str:
    """A, B or tie."""
    first, second = (
        len(re.findall(r"\bw1\b", question.partition(f"[Answer {name}]")[2].partition("[")[0]))
        for name in "AB"
    )
    return "A" if first > second else "B" if second > first else "tie"


class Stub(ThreadingHTTPServer):
    """`troubles`: (status, body, headers) of the next answers in the place of a verdict."""

    answer = staticmethod(prefers)

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles: list[tuple[int, str, dict[str, str]]] = []
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def asked(self) -> list[str]:
        """Questions that came, those that were answered by a trouble among them."""
        return [body["messages"][0]["content"] for path, _, body in self.seen if body]


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            trouble = self.server.troubles.pop(0) if body and self.server.troubles else None
        if trouble is None:
            said = self.server.answer(body["messages"][0]["content"]) if body else ""
            content = {"choices": [{"message": {"role": "assistant", "content": said}}]}
            trouble = (200, json.dumps(content), {})
        status, text, headers = trouble
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Not on the terminal."""


@contextlib.contextmanager
def served() -> Iterator[Stub]:
    with Stub() as stub:
        threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True).start()
        yield stub
        stub.shutdown()
