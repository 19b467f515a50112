"""Parity check of a conversion: both sides run on the same inputs and must agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sicot_jax.errors import InputError

NUM_PHOTOS = 8
# Largest difference over largest value. Sums of a ResNet-152 in another order differ by some 1e-6.
TOLERANCE = 1e-4
TOP_K = 3


def parity_photos() -> list[np.ndarray]:
    """Returns the photos of every parity check: smooth colours with noise, of several sizes.

    Returns:
      Uint8 arrays [H, W, 3], the same on every machine.
    """
    rng, photos = np.random.Generator(np.random.Philox(0)), []
    for _ in range(NUM_PHOTOS):
        height, width = rng.integers(120, 400, 2)
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        waves = rng.uniform(0, 12, (3, 4))
        colours = [np.sin(a * x + b * y + c) * np.cos(d * x * y) for a, b, c, d in waves]
        noise = rng.normal(0, 12, (height, width, 3))
        photos.append(np.clip(127 + 110 * np.stack(colours, -1) + noise, 0, 255).astype(np.uint8))
    return photos


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """Outputs of one side of a conversion for N photos or titles.

    Attributes:
      embedding: Float32 [N, D].
      logits: Float32 [N, C]; None without a classifier.
      box: Float32 [N, 4], left, top, right, bottom as fractions of the photo; None without a
        localisation branch.
    """

    embedding: np.ndarray
    logits: np.ndarray | None
    box: np.ndarray | None = None


def concatenate_outputs(parts: Sequence[ModelOutputs]) -> ModelOutputs:
    """Joins the outputs of several batches.

    Args:
      parts: Outputs of the batches, in order.

    Returns:
      The outputs of all inputs.
    """

    def join(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    return ModelOutputs(join("embedding"), join("logits"), join("box"))


@dataclasses.dataclass(frozen=True)
class ArrayDifference:
    """Difference of one output array between two sides.

    Attributes:
      max_difference: Largest absolute difference.
      mean_difference: Mean absolute difference.
      max_relative: Largest absolute difference over the largest absolute value.
    """

    max_difference: float
    mean_difference: float
    max_relative: float


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """Result of a parity check that passed.

    Attributes:
      label: What was compared with what, such as "JAX against PyTorch".
      inputs: Kind of the inputs, "photos" or "titles".
      count: Number of inputs.
      differences: Difference of each output that both sides have, by name.
      top_k_agreement: Share of the photos whose best `TOP_K` classes agree in order; None
        without a classifier.
      tolerance: Largest `max_relative` that passes.
    """

    label: str
    inputs: str
    count: int
    differences: dict[str, ArrayDifference]
    top_k_agreement: float | None = None
    tolerance: float = TOLERANCE

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self)


def check_parity(
    expected: ModelOutputs, actual: ModelOutputs, *, label: str, inputs: str = "photos"
) -> ParityReport:
    """Compares the outputs of both sides of a conversion.

    Args:
      expected: Outputs of the side that is converted.
      actual: Outputs of the conversion.
      label: What is compared with what, for the report and the error.
      inputs: Kind of the inputs.

    Returns:
      The report.

    Raises:
      InputError: An output differs by more than `TOLERANCE` of its largest value, or is not
        finite.
    """
    differences = {}
    for name in ("embedding", "logits", "box"):
        a, b = getattr(expected, name), getattr(actual, name)
        if a is None or b is None:
            continue
        difference = np.abs(np.asarray(a, np.float64) - b)
        largest = max(float(np.abs(a).max()), 1e-12)
        max_difference = float(difference.max())
        differences[name] = ArrayDifference(
            max_difference, float(difference.mean()), max_difference / largest
        )
        if not differences[name].max_relative <= TOLERANCE:  # NaN fails too
            raise InputError(
                f"{label}: {name} differs by up to {differences[name].max_relative:.2g} of its "
                f"largest value, wanted {TOLERANCE:g} at most; nothing is written"
            )
    agreement = None
    if expected.logits is not None and actual.logits is not None:
        best = [
            np.argsort(-logits, 1, kind="stable")[:, :TOP_K]
            for logits in (expected.logits, actual.logits)
        ]
        agreement = float(np.mean((best[0] == best[1]).all(1)))
    return ParityReport(label, inputs, len(expected.embedding), differences, agreement)


def parity_lines(reports: Sequence[ParityReport]) -> list[str]:
    """Formats parity reports for the terminal.

    Args:
      reports: Reports of a conversion.

    Returns:
      One line per report and output array, and one for the agreement of classes.
    """
    lines = []
    for report in reports:
        for name, difference in report.differences.items():
            lines.append(
                f"{report.label}: {name} differs by {difference.max_difference:.2g} at most, "
                f"{difference.mean_difference:.2g} on average ({difference.max_relative:.1g} of "
                f"the largest value; {report.count} {report.inputs})"
            )
        if report.top_k_agreement is not None:
            lines.append(
                f"{report.label}: the best {TOP_K} classes agree on "
                f"{report.top_k_agreement:.0%} of the photos"
            )
    return lines
