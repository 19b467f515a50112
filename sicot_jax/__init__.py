"""SICoT: long-tailed product recognition with co-trained titles, in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sicot_jax._version import __version__

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from pathlib import Path

    from sicot_jax.recognizer import Recognizer


def load(path: str | Path) -> Recognizer:
    """Loads the recogniser of a run folder, or of a folder of `sicot convert`.

    Args:
      path: The folder.

    Returns:
      The recogniser, on ONNX Runtime where the folder holds a graph, else on JAX.

    Raises:
      InputError: The folder is neither, the run is not finished, or a file was changed.

    Examples:
      >>> import tempfile
      >>> from sicot_jax.weights.untrained import write_untrained_bundle
      >>> recognizer = load(write_untrained_bundle(tempfile.mkdtemp()))
      >>> recognizer.classes.sku[:2]
      ['sku-0', 'sku-1']
    """
    # Imported here, so that `import sicot_jax` loads neither numpy nor Pillow.
    from sicot_jax import recognizer

    return recognizer.load_recognizer(path)
