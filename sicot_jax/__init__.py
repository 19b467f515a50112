"""SICoT: long-tailed product recognition with co-trained titles, in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from sicot_jax.recognizer import Recognizer

__version__ = "0.1.0"


def load(path: str | Path) -> Recognizer:
    """The recogniser of a run folder or of a folder of `sicot convert` (see `recognizer.load`)."""
    from sicot_jax import recognizer  # numpy and Pillow: not for those who ask for the version

    return recognizer.load(path)
