"""What every request passes: its id, an API key, a limit on its body, counting, a line in the log,
and no traceback out.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sicot_jax.serve import metrics
from sicot_jax.serve.api_keys import Keys

_log = logging.getLogger("sicot")
_OPEN = ("/healthz", "/readyz")  # for what watches the process
_ID = re.compile(rb"[\w.-]{1,64}")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
]


class _TooLarge(Exception):
    pass


class Gate:
    """ASGI middleware. `keys`: those that may call /v1 and /metrics; None: everyone may."""

    def __init__(self, app: ASGIApp, *, keys: Keys | None, largest_body: int):
        self.app, self.keys, self.largest_body = app, keys, largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        start, status, began, received = time.perf_counter(), 500, False, 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.largest_body:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal status, began
            if message["type"] == "http.response.start":
                status, began = message["status"], True
                own = [*_HEADERS, (b"x-request-id", request_id.encode())]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        async def refuse(code: int, name: str, text: str, more: Any = ()) -> None:
            if began:
                return
            body = json.dumps(
                {"error": {"code": name, "message": text, "request_id": request_id}}
            ).encode()
            own = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *more,
            ]
            await noted({"type": "http.response.start", "status": code, "headers": own})
            await noted({"type": "http.response.body", "body": body})

        try:
            length = headers.get(b"content-length", b"0")
            if not self._may(scope["path"], headers):
                await refuse(
                    401,
                    "no_key",
                    "wanted an API key: Authorization: Bearer KEY",
                    [(b"www-authenticate", b"Bearer")],
                )
            elif not length.isdigit() or int(length) > self.largest_body:
                raise _TooLarge
            else:
                await self.app(scope, limited, noted)
        except _TooLarge:
            # What is still on its way is not read; the connection cannot be used again.
            await refuse(
                413,
                "too_large",
                f"more than {self.largest_body} bytes; send a smaller photo",
                [(b"connection", b"close")],
            )
        except ClientDisconnect:
            status = 499  # nobody is there to be answered; nginx's number for it
        except Exception:
            _log.exception("%s failed", request_id)
            await refuse(500, "internal", "the service failed; its log has this request id")
        finally:
            seconds, route = time.perf_counter() - start, _route(scope)
            metrics.REQUESTS.labels(route, str(status)).inc()
            metrics.SECONDS.labels(route).observe(seconds)
            _log.info(
                "%s %s %s %d %.1f ms", request_id, scope["method"], route, status, seconds * 1e3
            )

    def _may(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if (
            self.keys is None
            or path in _OPEN
            or not (path.startswith("/v1/") or path in ("/metrics", "/openapi.json"))
        ):
            return True
        given = headers.get(b"authorization", b"").decode("latin-1")
        scheme, _, key = given.partition(" ")
        return scheme.lower() == "bearer" and self.keys.name_of(key.strip()) is not None


def _route(scope: Scope) -> str:
    """The pattern of the path, so that neither log nor metrics grow with what callers make up."""
    route = scope.get("route")
    return getattr(route, "path", None) or "other"
