"""A small server of chat completions that says what a test wants it to, and fails as it wants."""

import contextlib
import http.server
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def completion(text: Any, options: dict[str, float] | None = None, used: int | None = 10) -> dict[str, Any]:
    """A chat completion; `options` are probabilities of the last token of its text that is one of them."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if options is not None:
        top = [{"token": token, "logprob": math.log(share)} for token, share in options.items()]
        before, found, behind = text.rpartition(top[0]["token"])
        sure = [{"token": part, "logprob": 0.0, "top_logprobs": []} for part in ("x", before, behind, "<end>")]
        assert found
        choice["logprobs"] = {"content": [*sure[:2], top[0] | {"top_logprobs": top}, *sure[2:]]}
    return {"choices": [choice]} | ({} if used is None else {"usage": {"total_tokens": used}})


class Server(http.server.ThreadingHTTPServer):
    """Answers each call as `reply(question, number of the call)` says: a status, headers and a body."""

    daemon_threads = True
    request_queue_size = 256
    reply: Callable[[str, int], tuple[int, dict[str, str], bytes] | None]

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.waiting = self.most_waiting = 0
        self.pause = 0.0
        self.lock = threading.Lock()
        self.reply = lambda question, number: say(completion("A"))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):  # a client that left is what is tested
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.calls.append(body)
            server.keys.append(self.headers["Authorization"])
            number = len(server.calls)
            server.waiting += 1
            server.most_waiting = max(server.most_waiting, server.waiting)
        try:
            time.sleep(server.pause)
            told = server.reply(body["messages"][0]["content"], number)
        finally:
            with server.lock:
                server.waiting -= 1
        if told is None:
            self.connection.close()
            return
        status, headers, content = told
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args):
        pass


def say(value: Any, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return status, {name.replace("_", "-"): text for name, text in headers.items()}, content


@contextlib.contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on this machine, without a proxy before it."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()
