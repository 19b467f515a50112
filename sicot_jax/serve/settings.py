"""Settings of the service, as `sicot serve` hands them to its worker processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.serve.photo import PhotoLimits

_ROOT_PATH = re.compile(r"(/[\w.~-]+)*")
_VARIABLE = "SICOT_SERVE"  # a worker process starts with an import and has no arguments


@dataclasses.dataclass(frozen=True)
class ServiceSettings:
    """How a service is run.

    Attributes:
      index: index folder.
      database: URL of the database whose copy of the index is read; "" reads the folder.
      engine: "auto", "onnx" or "jax".
      require_gpu: refuse to start where the engine would run on the CPU.
      max_batch: photos in one call of the engine at most.
      threads: threads of ONNX Runtime in one worker, 0 for all cores.
      timeout_seconds: maximum duration of a request.
      max_wait_seconds: a photo is refused where it would wait longer than this in all, for anything
        but its own decoding, recognition and search.
      limits: limits of a query photo.
      keys: file of API keys, "" for none.
      events: SQLite file of events, "" for none.
      keep_queries: folder in which query photos are kept, "" for none.
      keep_days: days for which they are kept.
      root_path: prefix under which a proxy offers the service, such as "/find"; "" for none. The
        proxy may remove it from the path or leave it there.
      reload_seconds: interval at which changes of the index are looked for.

    Raises:
      InputError: no index there, a number that is not positive, or a prefix that is no path.
    """

    index: str
    database: str = dataclasses.field(default="", repr=False)  # may hold a password
    engine: str = "auto"
    require_gpu: bool = False
    max_batch: int = 32
    threads: int = 0
    timeout_seconds: float = 10.0
    max_wait_seconds: float = 0.5
    limits: PhotoLimits = dataclasses.field(default_factory=PhotoLimits)
    keys: str = ""
    events: str = ""
    keep_queries: str = ""
    keep_days: int = 30
    root_path: str = ""
    reload_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not Path(self.index).is_dir():
            raise InputError(
                f"{self.index}: no product index there; make one with `sicot index build`"
            )
        for name in (
            "max_batch",
            "max_wait_seconds",
            "timeout_seconds",
            "keep_days",
            "reload_seconds",
        ):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}, wanted more than 0")
        if not _ROOT_PATH.fullmatch(self.root_path):
            raise InputError(f"root_path={self.root_path!r:.100}, wanted a path such as /find")


def write_to_environment(settings: ServiceSettings) -> None:
    """Stores the settings in the environment of this process and its children.

    Args:
      settings: settings of the service.
    """
    os.environ[_VARIABLE] = json.dumps(dataclasses.asdict(settings))


def read_from_environment() -> ServiceSettings:
    """Returns the settings that `write_to_environment` stored."""
    stored = json.loads(os.environ[_VARIABLE])
    return ServiceSettings(**{**stored, "limits": PhotoLimits(**stored["limits"])})
