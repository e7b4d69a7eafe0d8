"""What stands around the server: a check of every request before anything else sees it, and the headers of replies.

- The name that a request was addressed to must be this server's: a foreign name that was made to point here (DNS
  rebinding) is refused.
- A request of another site's page is refused by its Origin and Sec-Fetch-Site. There are no cookies: the secret stands
  in a header, which no form and no picture of another site can send.
- Bodies are bounded. Replies forbid scripts and styles that are not the server's own files, and being framed.
"""

import ipaddress
import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import SplitResult, urlsplit

LARGEST = 512 * 1024  # bytes of a request's body: a rewritten answer has at most 100 thousand characters
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
LOCAL = ("127.0.0.1", "localhost", "::1")
SAFE = ("GET", "HEAD")

App = Callable[[Any, Any, Any], Awaitable[None]]


class Refusal(Exception):
    """A request that is refused: the status and a sentence for whoever sent it."""

    def __init__(self, status: int, says: str) -> None:
        super().__init__(says)
        self.status, self.says = status, says


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, host: str, address: str = "") -> None:
        """Args:
        host: the address that the server listens at.
        address: what people open, as https://NAME, if that is not the host: a proxy's, or this machine's.
        """
        self.app, self.host, self.address = app, host, address

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            check(scope["method"], headers, self.host, self.address)
            body = await _body(headers, receive)
        except Refusal as refusal:
            await _refuse(refusal, with_headers)
            return
        left = [{"type": "http.request", "body": body, "more_body": False}]

        async def once() -> Any:
            return left.pop() if left else await receive()

        await self.app(scope, once, with_headers)


def check(method: str, headers: dict[str, str], host: str, address: str = "") -> None:
    """Raises Refusal for a request that did not come from the server's own page, or from a program on purpose."""
    addressed = headers.get("host", "")
    if not _is_own(addressed, host, address):
        raise Refusal(421, "this server does not answer to that name; open the link that it printed.")
    site = headers.get("sec-fetch-site", "none")
    if site not in ("same-origin", "none") and not (method in SAFE and headers.get("sec-fetch-mode") == "navigate"):
        raise Refusal(403, "a page of another site asked for this; open the link that the server printed.")
    origin = headers.get("origin")
    if origin is not None and origin != address and _split(origin).netloc != addressed:
        raise Refusal(403, "a page of another site asked for this; open the link that the server printed.")
    if method not in SAFE and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refusal(415, "a body must be of the type application/json.")


def _split(url: str) -> SplitResult:
    """The parts of an address; none of one that is no address."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _is_own(addressed: str, host: str, address: str) -> bool:
    """Whether a Host header names this server.

    One that listens to this machine alone has its local names, and that of a proxy before it. One that others reach may
    be called by its number, which no foreign name server can give away, or by the name that it was started with.
    """
    name = _split(f"//{addressed}").hostname or ""
    if name and name == _split(address).hostname:
        return True
    if host in LOCAL:
        return name in LOCAL
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name in ("localhost", host.lower())


async def _body(headers: dict[str, str], receive: Any) -> bytes:
    """The whole body. Raises Refusal for one that is too large, without reading it to its end."""
    says = f"a body may have at most {LARGEST} bytes; make the text shorter."
    if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > LARGEST:
        raise Refusal(413, says)
    parts, size = [], 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST:
            raise Refusal(413, says)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _refuse(refusal: Refusal, send: Any) -> None:
    body = json.dumps({"error": refusal.says}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
