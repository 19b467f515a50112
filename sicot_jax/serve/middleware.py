"""Middleware of every request: request id, API key, body limit, metrics, log, security headers."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sicot_jax.serve import metrics
from sicot_jax.serve.api_keys import ApiKeys

_log = logging.getLogger("sicot")
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

    def __init__(self, receive: Receive, send: Send, request_id: str, max_body_bytes: int):
        self._receive, self._send = receive, send
        self._request_id, self._max_body_bytes = request_id, max_body_bytes
        self._received_bytes = 0
        self.status, self.started = 500, False

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
    """

    def __init__(self, app: ASGIApp, *, api_keys: ApiKeys | None, max_body_bytes: int):
        self.app, self.api_keys, self.max_body_bytes = app, api_keys, max_body_bytes

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
        start, exchange = (
            time.perf_counter(),
            _Exchange(receive, send, request_id, self.max_body_bytes),
        )
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
            seconds, route = time.perf_counter() - start, _route_pattern(scope)
            metrics.REQUESTS.labels(route, str(exchange.status)).inc()
            metrics.REQUEST_SECONDS.labels(route).observe(seconds)
            _log.info(
                "%s %s %s %d %.1f ms",
                request_id,
                scope["method"],
                route,
                exchange.status,
                seconds * 1e3,
            )

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        headers = dict(scope["headers"])
        if not self._authorized(scope["path"], headers):
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
        await self.app(scope, exchange.receive, exchange.send)

    def _authorized(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self.api_keys is None or path in _WITHOUT_KEY:
            return True
        if not (path.startswith("/v1/") or path in ("/metrics", "/openapi.json")):
            return True
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and self.api_keys.owner(key.strip()) is not None


def _route_pattern(scope: Scope) -> str:
    """Returns the pattern of the path: log and metrics must not grow with invented paths."""
    return getattr(scope.get("route"), "path", None) or "other"
