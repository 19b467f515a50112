"""Photos of synthetic products that are easy to distinguish, and a manifest of them."""

from __future__ import annotations

import colorsys
import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image


def photo(product: int, number: int = 0, *, size: int = 24) -> np.ndarray:
    """Returns stripes of the product's colour and width, with noise: uint8 [size, size, 3]."""
    rng = np.random.default_rng([product, number])
    colour = 255 * np.array(colorsys.hsv_to_rgb(product / 6.5 % 1, 0.9, 0.8))
    stripes = (np.arange(size) * (product + 2) // 8 % 2)[:, None, None]
    noisy = colour * (0.5 + 0.5 * stripes) + rng.normal(0, 8, (size, size, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    """Encodes a photo, uint8 [H, W, 3]."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def sku(product: int) -> str:
    """Returns the SKU of a product."""
    return f"sku-{product}"


def write_manifest_csv(folder: Path, rows: list[dict[str, str]], photos: dict[str, bytes]) -> Path:
    """Writes a manifest with its photos in the same folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in photos.items():
        (folder / name).write_bytes(data)
    path = folder / "products.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
