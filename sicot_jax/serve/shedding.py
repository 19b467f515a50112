"""Refuses photos by the first bytes of their requests while a worker is overloaded.

Parsed and routed, a refusal costs a tenth of an answer of a small network: at ten times the rate
that a worker carries it would do nothing else. Here it costs a few system calls.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sicot_jax.serve import metrics
from sicot_jax.serve.middleware import PHOTO_ROUTES, busy_response

_READ_BYTES = 65_536
_LINGER_SECONDS = 5.0
_log = logging.getLogger("sicot")


class SheddingProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which answers 503 to photos while the worker is busy.

    Attributes:
      is_busy: whether a photo that comes now would wait too long.
      prefix: path under which a proxy offers the service.
    """

    is_busy: ClassVar[Callable[[], bool]] = staticmethod(lambda: False)
    prefix: ClassVar[str] = ""
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection.

        Args:
          transport: of the connection.
        """
        # asyncio takes 256 kB for each read and gives back what it did not need: the holes that
        # this leaves in the heap made 0.6 kB a request.
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Reads a part of a request.

        Args:
          data: the bytes that have come.
        """
        if self._refused:  # the rest of a photo: closed at once, the client might lose the answer
            return
        if self.conn.their_state is h11.IDLE and data.startswith(b"POST "):
            path = data[5:200].partition(b" ")[0].partition(b"?")[0].decode("latin-1")
            route = path.removeprefix(self.prefix)
            if route in PHOTO_ROUTES and type(self).is_busy():
                self._refuse(route)
                return
        super().data_received(data)

    def _refuse(self, route: str) -> None:
        self._refused, request_id = True, secrets.token_hex(8)
        self.transport.write(busy_response(request_id))
        self.transport.write_eof()
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.transport.close)
        metrics.REQUESTS.labels(route, "503").inc()
        _log.info("%s POST %s 503, at once", request_id, route)
