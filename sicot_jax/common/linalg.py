"""Linear algebra in numpy."""

from __future__ import annotations

import numpy as np


def l2_normalize(rows: np.ndarray) -> np.ndarray:
    """Scales vectors to length 1; vectors of zeros stay.

    Args:
      rows: [..., D]; half precision and integers are converted to float32.

    Returns:
      float32, or float64 where `rows` are, of the same shape.
    """
    rows = np.asarray(rows)
    if rows.dtype != np.float64:
        rows = rows.astype(np.float32, copy=False)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.maximum(lengths, np.finfo(np.float32).tiny)
