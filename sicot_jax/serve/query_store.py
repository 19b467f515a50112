"""Query photos that the service was told to keep, for as many days as it was told."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from pathlib import Path

_CLEAN_SECONDS = 3600.0
_log = logging.getLogger("sicot")


class Queries:
    """A folder of `REQUEST_ID-RANDOM.photo`; older ones are removed at the start and about once an
    hour.
    """

    def __init__(self, folder: Path, days: int):
        self.folder, self.seconds, self._cleaned = folder, days * 86_400.0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.clean()

    def keep(self, request_id: str, data: bytes) -> None:
        """A photo that cannot be kept is logged; its request is answered all the same."""
        try:
            # Clients may choose the id: the rest of the name keeps their photos apart.
            (self.folder / f"{request_id}-{secrets.token_hex(4)}.photo").write_bytes(data)
        except OSError as error:
            _log.error("%s not kept: %s", request_id, error)

    def clean(self) -> None:
        now = time.time()
        if now - self._cleaned < _CLEAN_SECONDS:
            return
        self._cleaned = now
        for path in self.folder.glob("*.photo"):
            with contextlib.suppress(OSError):  # another worker was first
                if now - path.stat().st_mtime > self.seconds:
                    path.unlink()
