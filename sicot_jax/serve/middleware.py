"""Middleware of every request: request id, API key, body limit, metrics, log, security headers."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sicot_jax.serve import metrics
from sicot_jax.serve.admission import BUSY
from sicot_jax.serve.api_keys import ApiKeys

_log = logging.getLogger("sicot")
PHOTO_ROUTES = ("/v1/recognize", "/v1/search")
_WITHOUT_KEY = ("/healthz", "/readyz")  # for what monitors the process
_REQUEST_ID = re.compile(rb"[\w.-]{1,64}")
_Headers = Sequence[tuple[bytes, bytes]]
_SECURITY_HEADERS: _Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; "
        b"base-uri 'none'; form-action 'none'",
    ),
]


class _BodyTooLargeError(Exception):
    pass


class _Exchange:
    """Receives one request and sends its response; knows the response's status."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        request_id: str,
        max_body_bytes: int,
        without_body: bool,
    ):
        self._receive, self._send = receive, send
        self._request_id, self._max_body_bytes = request_id, max_body_bytes
        self._received_bytes, self._without_body = 0, without_body
        self.status, self.started = 500, False
        self.route = ""  # where it is known before the app has looked for it

    async def receive(self) -> Message:
        message = await self._receive()
        self._received_bytes += len(message.get("body", b""))
        if self._received_bytes > self._max_body_bytes:
            raise _BodyTooLargeError
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            added = [*_SECURITY_HEADERS, (b"x-request-id", self._request_id.encode())]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        elif self._without_body:
            message = {**message, "body": b""}
        await self._send(message)

    async def refuse(self, status: int, code: str, text: str, headers: _Headers = ()) -> None:
        """Sends an error, unless a response has begun."""
        if self.started:
            return
        error = {"code": code, "message": text, "request_id": self._request_id}
        body = json.dumps({"error": error}).encode()
        all_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *headers,
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": all_headers})
        await self.send({"type": "http.response.body", "body": body})


class RequestMiddleware:
    """ASGI middleware that every request passes; an exception never leaves it.

    Args:
      app: the application.
      api_keys: keys that may call /v1 and /metrics; None lets everyone.
      max_body_bytes: maximum size of a request's body.
      is_busy: whether a photo that comes now would wait too long. Asked before the app sees the
        request and before its body is read: a refusal has to cost a fraction of an answer.
      root_path: prefix under which a proxy offers the service; "" for that of the server.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: ApiKeys | None,
        max_body_bytes: int,
        is_busy: Callable[[], bool],
        root_path: str = "",
    ):
        self.app, self.api_keys, self.max_body_bytes = app, api_keys, max_body_bytes
        self.is_busy, self.root_path = is_busy, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection.

        Args:
          scope: the connection.
          receive: gives the parts of the request.
          send: takes the parts of the response.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client_id = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = (
            client_id.decode() if _REQUEST_ID.fullmatch(client_id) else secrets.token_hex(8)
        )
        scope.setdefault("state", {})["request_id"] = request_id
        start, method = time.perf_counter(), scope["method"]
        exchange = _Exchange(
            receive,
            send,
            request_id=request_id,
            max_body_bytes=self.max_body_bytes,
            without_body=method == "HEAD",
        )
        # HEAD is answered by the route of GET, as load balancers and monitors expect.
        scope = {
            **scope,
            "method": "GET" if method == "HEAD" else method,
            "root_path": self.root_path or scope.get("root_path", ""),
            "query_string": _without_empty(scope["query_string"]),
        }
        try:
            await self._answer(scope, exchange)
        except _BodyTooLargeError:
            # The rest of the body is not read; the connection cannot be used again.
            await exchange.refuse(
                413,
                "too_large",
                f"more than {self.max_body_bytes} bytes; send a smaller photo",
                [(b"connection", b"close")],
            )
        except ClientDisconnect:
            exchange.status = 499  # nginx's number: nobody receives the response
        except Exception:
            _log.exception("%s failed", request_id)
            await exchange.refuse(
                500, "internal", "the service failed; its log has this request id"
            )
        finally:
            seconds = time.perf_counter() - start
            route = exchange.route or _route_pattern(scope)
            metrics.REQUESTS.labels(route, str(exchange.status)).inc()
            metrics.REQUEST_SECONDS.labels(route).observe(seconds)
            _log.info(
                "%s %s %s %d %.1f ms",
                request_id,
                method,
                route,
                exchange.status,
                seconds * 1e3,
            )

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        headers = dict(scope["headers"])
        path = _path_below_root(scope)
        if not self._authorized(path, headers):
            await exchange.refuse(
                401,
                "no_key",
                "wanted an API key: Authorization: Bearer KEY",
                [(b"www-authenticate", b"Bearer")],
            )
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            raise _BodyTooLargeError
        if path in PHOTO_ROUTES and scope["method"] == "POST" and self.is_busy():
            exchange.route = path
            await exchange.refuse(503, "error", BUSY, [(b"retry-after", b"1")])
            return
        await self.app(scope, exchange.receive, exchange.send)

    def _authorized(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self.api_keys is None or path in _WITHOUT_KEY:
            return True
        if not (path.startswith("/v1/") or path in ("/metrics", "/openapi.json")):
            return True
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and self.api_keys.owner(key.strip()) is not None


def busy_response(request_id: str) -> bytes:
    """Makes the response to a photo that is refused at once, after which the connection ends.

    Args:
      request_id: id of the request.

    Returns:
      The bytes of the response.
    """
    error = {"code": "error", "message": BUSY, "request_id": request_id}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"),
        (b"connection", b"close"),
        (b"x-request-id", request_id.encode()),
        *_SECURITY_HEADERS,
    ]
    lines = [b"HTTP/1.1 503 Service Unavailable", *(b": ".join(header) for header in headers)]
    return b"\r\n".join([*lines, b"", body])


def _path_below_root(scope: Scope) -> str:
    """Returns the path without the prefix under which a proxy offers the service."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _without_empty(query: bytes) -> bytes:
    """Returns a query string without parameters of no value: forms send those for "not given"."""
    return b"&".join(part for part in query.split(b"&") if part.partition(b"=")[2])


def _route_pattern(scope: Scope) -> str:
    """Returns the pattern of the path: log and metrics must not grow with invented paths."""
    return getattr(scope.get("route"), "path", None) or "other"
