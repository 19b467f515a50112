"""SICoT: long-tailed product recognition with co-trained titles, in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sicot_jax._version import __version__

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from pathlib import Path

    from sicot_jax.recognizer import Recognizer


def load(path: str | Path) -> Recognizer:
    """The recogniser of a run folder or of a folder of `sicot convert` (see `recognizer.load`)."""
    from sicot_jax import recognizer  # numpy and Pillow: not for those who ask for the version

    return recognizer.load(path)
