"""How a service is run: what `sicot serve` was told, as its worker processes read it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.serve.photo import Limits

_VARIABLE = "SICOT_SERVE"  # a worker process starts with an import and has no arguments


@dataclasses.dataclass(frozen=True)
class Settings:
    """index: its folder. database: URL of the database whose copy is read, "" for the folder
    itself. threads: of the engine in one worker, 0 for all cores. seconds: a request may take.
    wait_seconds: a photo may expect to wait for the engine; beyond that requests are turned away.
    keys, events, keep_queries: a file, a file, a folder; "" for none.
    """

    index: str
    database: str = dataclasses.field(default="", repr=False)  # may hold a password
    engine: str = "auto"
    largest_batch: int = 32
    threads: int = 0
    seconds: float = 10.0
    wait_seconds: float = 0.5
    limits: Limits = Limits()
    keys: str = ""
    events: str = ""
    keep_queries: str = ""
    keep_days: int = 30
    reload_seconds: float = 1.0

    def __post_init__(self):
        if not Path(self.index).is_dir():
            raise InputError(
                f"{self.index}: no product index there; make one with `sicot index build`"
            )
        for name in ("largest_batch", "wait_seconds", "seconds", "keep_days", "reload_seconds"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}, wanted more than 0")


def to_environment(settings: Settings) -> None:
    os.environ[_VARIABLE] = json.dumps(dataclasses.asdict(settings))


def from_environment() -> Settings:
    stored = json.loads(os.environ[_VARIABLE])
    return Settings(**{**stored, "limits": Limits(**stored["limits"])})
