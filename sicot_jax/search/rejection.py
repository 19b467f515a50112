"""How sure an answer is, and from when on it is given: "not in the catalogue" is an answer too.

A logistic regression on three numbers of an answer, fitted on validation photos twice: as they are,
  and with their product taken out of classifier and index, when whatever is answered is wrong. So
  it has seen photos of products that there are not,
of the hardest kind: from the same catalogue; no second data set is needed. What is unusual for the
  catalogue altogether has its certainty lowered (index/typicality).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import read_json, write_json
from sicot_jax.errors import InputError
from sicot_jax.search.novelty import Typicality

FORMAT = 2
FEWEST = 50  # validation photos that a calibration needs
UNKNOWN_SHARE = 0.2  # of photos that are of no product, where nothing better is known
PRECISION = 0.95  # of the answers that are given
SUPPORT = 0.05  # of the photos of products, that a precision is estimated on
# of the catalogue's photos, those farthest from the others, and what is beyond: less sure, down to
# not at all
UNUSUAL = 0.05
_CURVE = 50  # points that are kept


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Of an answer: its probability, the cosine of the nearest photo of any product, and of one of
    its own (0: not near); and the share of the catalogue's photos that are as unusual as this one.
    """

    probability: float
    nearest: float
    own: float
    usual: float

    def numbers(self) -> list[float]:
        share = min(max(self.probability, 1e-6), 1 - 1e-6)
        return [math.log(share / (1 - share)), self.nearest, self.nearest - self.own]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """certainty = sigmoid(intercept + weights . numbers) min(1, usual / UNUSUAL); an answer is
    given from `threshold` on.

    curve: [threshold, coverage of photos of products, precision] as estimated at the fit, with
      `unknown_share` of photos of no product. reached: the precision at the threshold, below the
      `precision` that was wanted where no threshold has that.
    """

    weights: list[float]
    intercept: float
    threshold: float
    precision: float
    reached: float
    unknown_share: float
    photos: int
    curve: list[list[float]]
    typicality: Typicality | None
    format: int = FORMAT

    def certainty(self, evidence: Evidence) -> float:
        """The probability that the answer is right."""
        total = self.intercept + sum(
            w * x for w, x in zip(self.weights, evidence.numbers(), strict=True)
        )
        return min(1.0, evidence.usual / UNUSUAL) / (1 + math.exp(-min(max(total, -50.0), 50.0)))

    def usual(self, embedding: np.ndarray) -> float:
        """Of a photo's embedding [D], for its evidence."""
        return 1.0 if self.typicality is None else self.typicality.share(embedding)


def fit(
    known: Sequence[Evidence],
    right: Sequence[bool],
    unknown: Sequence[Evidence],
    *,
    typicality: Typicality | None = None,
    precision: float = PRECISION,
    unknown_share: float = UNKNOWN_SHARE,
) -> Calibration:
    """From answers to photos of products, and to photos of none, which count as `unknown_share` of
    all. Without `typicality` every photo is usual.

    The threshold is the one of most coverage among those of that precision. Where none has it with
    a coverage of at least `SUPPORT`, it is the one that tells right answers from wrong ones best
    (most right and fewest wrong ones answered, in shares). Needs scikit-learn.
    """
    from sklearn.linear_model import LogisticRegression

    rows = np.array([e.numbers() for e in (*known, *unknown)])
    labels = np.array([*right, *([False] * len(unknown))])
    weight = np.concatenate(
        [
            np.full(len(known), (1 - unknown_share) / len(known)),
            np.full(len(unknown), unknown_share / len(unknown)),
        ]
    )
    if labels.all() or not labels.any():
        # Nothing to tell apart: the prior alone.
        share = float(np.clip(np.sum(weight * labels), 1e-6, 1 - 1e-6))
        weights, intercept = [0.0] * rows.shape[1], math.log(share / (1 - share))
    else:
        model = LogisticRegression(C=1e3, max_iter=1000).fit(
            rows, labels, sample_weight=weight * len(rows)
        )
        weights, intercept = model.coef_[0].tolist(), float(model.intercept_[0])
    bare = Calibration(
        weights, intercept, 0.0, precision, 0.0, unknown_share, len(known), [], typicality
    )
    scores = np.array([bare.certainty(e) for e in (*known, *unknown)])
    curve = coverage_curve(scores, labels, np.arange(len(rows)) < len(known), weight)
    enough = [point for point in curve if point[2] >= precision and point[1] >= SUPPORT]
    best = (
        max(enough, key=lambda p: p[1])
        if enough
        else max(curve, key=lambda p: _told_apart(p[0], scores, labels, weight))
    )
    some = [curve[i] for i in np.unique(np.linspace(0, len(curve) - 1, _CURVE).astype(int))]
    return dataclasses.replace(
        bare,
        threshold=best[0],
        reached=best[2],
        curve=[[round(x, 6) for x in point] for point in some],
    )


def _told_apart(
    threshold: float, scores: np.ndarray, right: np.ndarray, weight: np.ndarray
) -> float:
    answered = scores >= threshold
    return float(
        np.sum((weight * right)[answered]) / max(np.sum(weight * right), 1e-12)
        - np.sum((weight * ~right)[answered]) / max(np.sum(weight * ~right), 1e-12)
    )


def coverage_curve(
    scores: np.ndarray, right: np.ndarray, known: np.ndarray, weight: np.ndarray
) -> list[list[float]]:
    """[threshold, coverage, precision] at every score: the share of photos of products that get an
    answer, and the share of answers that are right.
    """
    order = np.argsort(-scores, kind="stable")
    answered = np.cumsum(weight[order])
    correct = np.cumsum((weight * right)[order])
    covered = np.cumsum((weight * known)[order]) / np.sum(weight * known)
    last = np.flatnonzero(
        np.append(np.diff(scores[order]) != 0, True)
    )  # equal scores are answered together
    return [
        [float(scores[order[i]]), float(covered[i]), float(correct[i] / answered[i])] for i in last
    ]


def write_calibration(path: Path, calibration: Calibration) -> None:
    stored = {f.name: getattr(calibration, f.name) for f in dataclasses.fields(calibration)}
    typicality = calibration.typicality.stored() if calibration.typicality else None
    write_json(path, stored | {"typicality": typicality})


def read_calibration(path: Path) -> Calibration | None:
    """None where the index has none, as it had too few validation photos. InputError for a file of
    another format.
    """
    if not path.exists():
        return None
    stored: dict[str, Any] = read_json(path, "the calibration of an index")
    if stored.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {stored.get('format')}, this version reads {FORMAT}; build the index again"
        )
    try:
        typicality = (
            Typicality.read(stored["typicality"]) if stored["typicality"] is not None else None
        )
        return Calibration(**stored | {"typicality": typicality})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not as it was written ({error}); build the index again"
        ) from error
