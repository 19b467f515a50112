"""Stores query photos for a number of days, when enabled."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from pathlib import Path

_CLEAN_SECONDS = 3600.0
_log = logging.getLogger("sicot")


class QueryStore:
    """A folder of `REQUEST_ID-RANDOM.photo`; expired photos are removed at the start and hourly.

    Args:
      folder: made if missing, readable by its owner alone.
      days: days for which a photo is kept.
    """

    def __init__(self, folder: Path, days: int):
        self.folder, self.seconds, self._cleaned = folder, days * 86_400.0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.remove_expired()

    def save(self, request_id: str, data: bytes) -> None:
        """Saves a photo; a failure is logged and does not fail the request.

        Args:
          request_id: id of the request.
          data: the photo's bytes.
        """
        try:
            # Clients may choose the id: the rest of the name keeps their photos apart.
            (self.folder / f"{request_id}-{secrets.token_hex(4)}.photo").write_bytes(data)
        except OSError as error:
            _log.error("%s not kept: %s", request_id, error)

    def remove_expired(self) -> None:
        """Removes expired photos, at most once an hour."""
        now = time.time()
        if now - self._cleaned < _CLEAN_SECONDS:
            return
        self._cleaned = now
        for path in self.folder.glob("*.photo"):
            with contextlib.suppress(OSError):  # another worker was first
                if now - path.stat().st_mtime > self.seconds:
                    path.unlink()
