"""Query photos that the service was told to keep, for as many days as it was told."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

_CLEAN_SECONDS = 3600.0


class Queries:
    """A folder of `REQUEST_ID.photo`; older ones are removed about once an hour."""

    def __init__(self, folder: Path, days: int):
        self.folder, self.seconds, self._cleaned = folder, days * 86_400.0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)

    def keep(self, request_id: str, data: bytes) -> None:
        (self.folder / f"{request_id}.photo").write_bytes(data)
        self.clean()

    def clean(self) -> None:
        now = time.time()
        if now - self._cleaned < _CLEAN_SECONDS:
            return
        self._cleaned = now
        for path in self.folder.glob("*.photo"):
            with contextlib.suppress(FileNotFoundError):  # another worker was first
                if now - path.stat().st_mtime > self.seconds:
                    path.unlink()
