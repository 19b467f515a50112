"""Settings of the service, as `sicot serve` hands them to its worker processes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.serve.photo import PhotoLimits

_VARIABLE = "SICOT_SERVE"  # a worker process starts with an import and has no arguments


@dataclasses.dataclass(frozen=True)
class ServiceSettings:
    """How a service is run.

    Attributes:
      index: index folder.
      database: URL of the database whose copy of the index is read; "" reads the folder.
      engine: "auto", "onnx" or "jax".
      max_batch: photos in one call of the engine at most.
      threads: threads of ONNX Runtime in one worker, 0 for all cores.
      timeout_seconds: maximum duration of a request.
      max_wait_seconds: a photo is refused where it would wait longer than this for the engine.
      limits: limits of a query photo.
      keys: file of API keys, "" for none.
      events: SQLite file of events, "" for none.
      keep_queries: folder in which query photos are kept, "" for none.
      keep_days: days for which they are kept.
      reload_seconds: interval at which changes of the index are looked for.

    Raises:
      InputError: no index there, or a number that is not positive.
    """

    index: str
    database: str = dataclasses.field(default="", repr=False)  # may hold a password
    engine: str = "auto"
    max_batch: int = 32
    threads: int = 0
    timeout_seconds: float = 10.0
    max_wait_seconds: float = 0.5
    limits: PhotoLimits = dataclasses.field(default_factory=PhotoLimits)
    keys: str = ""
    events: str = ""
    keep_queries: str = ""
    keep_days: int = 30
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
