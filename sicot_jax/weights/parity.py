"""Both sides of a conversion on the same photos: how far apart they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sicot_jax.errors import InputError

PHOTOS = 8
TOLERANCE = 1e-4  # of the largest value; sums of a ResNet-152 in another order differ by some 1e-6
TOP = 3


def fixed_photos() -> list[np.ndarray]:
    """Uint8 [H, W, 3] of several sizes and aspect ratios, the same everywhere: smooth colours with
    some noise.
    """
    rng, photos = np.random.Generator(np.random.Philox(0)), []
    for _ in range(PHOTOS):
        height, width = rng.integers(120, 400, 2)
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        waves = rng.uniform(0, 12, (3, 4))
        colours = [np.sin(a * x + b * y + c) * np.cos(d * x * y) for a, b, c, d in waves]
        noise = rng.normal(0, 12, (height, width, 3))
        photos.append(np.clip(127 + 110 * np.stack(colours, -1) + noise, 0, 255).astype(np.uint8))
    return photos


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Of a list of photos, or of titles: embedding float32 [N, D], logits float32 [N, C] or None
    without a classifier, box float32 [N, 4] or None without a box branch.
    """

    embedding: np.ndarray
    logits: np.ndarray | None
    box: np.ndarray | None = None


def prove(here: Outputs, there: Outputs, *, what: str, items: str = "photos") -> dict[str, Any]:
    """How far `there` is from `here`. InputError where it is further than `TOLERANCE`, or not
    finite.

    Returns: for embedding, logits and box the largest and the mean difference, absolute and as a
      share of the largest value; the share of photos whose best three classes agree, in order.
    """
    found: dict[str, Any] = {items: len(here.embedding), "tolerance": TOLERANCE}
    for name in ("embedding", "logits", "box"):
        a, b = getattr(here, name), getattr(there, name)
        if a is None or b is None:
            continue
        difference, largest = (
            np.abs(np.asarray(a, np.float64) - b),
            max(float(np.abs(a).max()), 1e-12),
        )
        found[name] = {
            "max_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
            "max_relative": float(difference.max()) / largest,
        }
        if not found[name]["max_relative"] <= TOLERANCE:  # nan is no agreement
            raise InputError(
                f"{what}: {name} differs by up to {found[name]['max_relative']:.2g} of its largest value, wanted "
                f"{TOLERANCE:g} at most; nothing is written"
            )
    if here.logits is not None and there.logits is not None:
        best = [
            np.argsort(-logits, 1, kind="stable")[:, :TOP] for logits in (here.logits, there.logits)
        ]
        found["top3_agreement"] = float(np.mean((best[0] == best[1]).all(1)))
    return found


def proof_lines(proofs: dict[str, dict[str, Any]]) -> list[str]:
    """For the terminal, a line for each comparison and array."""
    lines = []
    for what, found in proofs.items():
        counted = f"{found['photos']} photos" if "photos" in found else f"{found['titles']} titles"
        for name in ("embedding", "logits", "probability", "box"):
            if name in found:
                row = found[name]
                lines.append(
                    f"{what}: {name} differs by {row['max_difference']:.2g} at most, {row['mean_difference']:.2g} on average "
                    f"({row['max_relative']:.1g} of the largest value; {counted})"
                )
        if "top3_agreement" in found:
            lines.append(
                f"{what}: the best three classes agree on {found['top3_agreement']:.0%} of the photos"
            )
    return lines


def stacked(photos: Sequence[Outputs]) -> Outputs:
    """Outputs of each photo alone -> of all of them."""

    def of(name: str) -> Any:
        found = [getattr(one, name) for one in photos]
        return None if found[0] is None else np.concatenate(found)

    return Outputs(of("embedding"), of("logits"), of("box"))
