"""Open-set rejection: calibrated confidence of an answer, and the threshold to reject it below.

A photo whose answer is rejected counts as not in the catalogue.

A logistic regression on three features of an answer. It is fitted to validation photos twice: as
they are, and with their product removed from classifier and index, so that every answer is wrong.
The second set represents photos of products that are not in the catalogue, of the hardest kind:
from the same catalogue. No second data set is needed. Photos unlike the catalogue altogether have
their confidence lowered (`novelty`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.common.files import read_json, write_json
from sicot_jax.common.json_types import check_field_types
from sicot_jax.common.text import one_line_error
from sicot_jax.errors import InputError
from sicot_jax.search.novelty import NoveltyDetector

FORMAT = 3
MIN_PHOTOS = 50  # validation photos that a calibration needs
OPEN_SET_PRIOR = 0.2  # share of query photos that show no product of the catalogue
TARGET_PRECISION = 0.95  # of the answers that are not rejected
MIN_COVERAGE = 0.05  # of the catalogue's photos, for a precision estimate to count
NOVELTY_LEVEL = 0.05  # p-values below it lower the confidence, in proportion
_CURVE_POINTS = 50
_NUM_REGRESSORS = 3  # of `ConfidenceFeatures.regressors`


@dataclasses.dataclass(frozen=True)
class ConfidenceFeatures:
    """What the confidence of an answer is computed from.

    Attributes:
      probability: Probability of the answered product, 0 to 1.
      nearest_similarity: Cosine of the nearest photo of any product.
      match_similarity: Cosine of the nearest photo of the answered product; 0 where it is not
        among the nearest products.
      p_value: Conformal p-value of the photo under the catalogue's distribution (`novelty`).
    """

    probability: float
    nearest_similarity: float
    match_similarity: float
    p_value: float

    def regressors(self) -> list[float]:
        """Returns the inputs of the logistic regression: log odds, nearest cosine, cosine gap."""
        share = min(max(self.probability, 1e-6), 1 - 1e-6)
        gap = self.nearest_similarity - self.match_similarity
        return [math.log(share / (1 - share)), self.nearest_similarity, gap]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Fitted confidence of answers, and the threshold from which an answer is given.

    confidence = sigmoid(intercept + weights . regressors) * min(1, p_value / NOVELTY_LEVEL)

    Attributes:
      weights: Coefficients of `ConfidenceFeatures.regressors`.
      intercept: Intercept of the logistic regression.
      threshold: Answers of lower confidence are rejected.
      target_precision: Precision that was asked for.
      precision: Precision at the threshold; below the target where no threshold reaches it.
      open_set_prior: Assumed share of photos that show no product of the catalogue.
      num_photos: Photos of products that were fitted.
      curve: Points [threshold, coverage of photos of products, precision] estimated in the fit.
      novelty: Detector of photos unlike the catalogue; None where every photo counts as usual.
      format: Version of the file format.
    """

    weights: list[float]
    intercept: float
    threshold: float
    target_precision: float
    precision: float
    open_set_prior: float
    num_photos: int
    curve: list[list[float]]
    novelty: NoveltyDetector | None
    format: int = FORMAT

    def confidence(self, features: ConfidenceFeatures) -> float:
        """Returns the probability that an answer is right.

        Args:
          features: Features of the answer.

        Returns:
          Confidence, 0 to 1.
        """
        logit = self.intercept + sum(
            w * x for w, x in zip(self.weights, features.regressors(), strict=True)
        )
        sigmoid = 1 / (1 + math.exp(-min(max(logit, -50.0), 50.0)))
        return min(1.0, features.p_value / NOVELTY_LEVEL) * sigmoid

    def p_value(self, embedding: np.ndarray) -> float:
        """Returns the photo's conformal p-value, 1 without a novelty detector.

        Args:
          embedding: Embedding of one photo, float [D].

        Returns:
          A number in (0, 1].
        """
        return 1.0 if self.novelty is None else self.novelty.p_value(embedding)


def fit_calibration(
    known: Sequence[ConfidenceFeatures],
    correct: Sequence[bool],
    unknown: Sequence[ConfidenceFeatures],
    *,
    novelty: NoveltyDetector | None = None,
    target_precision: float = TARGET_PRECISION,
    open_set_prior: float = OPEN_SET_PRIOR,
) -> Calibration:
    """Fits the confidence of answers and chooses the rejection threshold.

    The threshold is the one of highest coverage among those that reach the target precision with a
    coverage of at least `MIN_COVERAGE`; where there is none, the one of the highest Youden index.
    Needs scikit-learn.

    Args:
      known: Features of answers to photos of products.
      correct: Whether each of these answers is right.
      unknown: Features of answers to photos that show no product of the catalogue.
      novelty: Detector of photos unlike the catalogue, stored with the calibration.
      target_precision: Wanted precision of the answers that are given.
      open_set_prior: Share of all query photos that `unknown` represents.

    Returns:
      The calibration.
    """
    regressors = np.array([features.regressors() for features in (*known, *unknown)])
    labels = np.array([*correct, *([False] * len(unknown))])
    sample_weights = np.concatenate(
        [
            np.full(len(known), (1 - open_set_prior) / len(known)),
            np.full(len(unknown), open_set_prior / len(unknown)),
        ]
    )
    coefficients, intercept = _fit_logistic(regressors, labels, sample_weights)
    unthresholded = Calibration(
        coefficients, intercept, 0.0, target_precision, 0.0, open_set_prior, len(known), [], novelty
    )
    scores = np.array([unthresholded.confidence(features) for features in (*known, *unknown)])
    is_known = np.arange(len(labels)) < len(known)
    curve = coverage_curve(scores, labels, is_known, sample_weights)
    precise = [p for p in curve if p[2] >= target_precision and p[1] >= MIN_COVERAGE]
    if precise:
        best = max(precise, key=lambda point: point[1])
    else:
        best = max(curve, key=lambda p: _youden_index(p[0], scores, labels, sample_weights))
    kept = np.unique(np.linspace(0, len(curve) - 1, _CURVE_POINTS).astype(int))
    return dataclasses.replace(
        unthresholded,
        threshold=best[0],
        precision=best[2],
        curve=[[round(x, 6) for x in curve[i]] for i in kept],
    )


def _fit_logistic(
    regressors: np.ndarray, labels: np.ndarray, sample_weights: np.ndarray
) -> tuple[list[float], float]:
    from sklearn.linear_model import LogisticRegression

    if labels.all() or not labels.any():  # one class alone: the prior
        share = float(np.clip(np.sum(sample_weights * labels), 1e-6, 1 - 1e-6))
        return [0.0] * regressors.shape[1], math.log(share / (1 - share))
    model = LogisticRegression(C=1e3, max_iter=1000)
    model.fit(regressors, labels, sample_weight=sample_weights * len(labels))
    return model.coef_[0].tolist(), float(model.intercept_[0])


def _youden_index(
    threshold: float, scores: np.ndarray, correct: np.ndarray, weights: np.ndarray
) -> float:
    """Returns the share of right answers given minus the share of wrong answers given."""
    answered = scores >= threshold
    return float(
        np.sum((weights * correct)[answered]) / max(np.sum(weights * correct), 1e-12)
        - np.sum((weights * ~correct)[answered]) / max(np.sum(weights * ~correct), 1e-12)
    )


def coverage_curve(
    scores: np.ndarray, correct: np.ndarray, is_known: np.ndarray, weights: np.ndarray
) -> list[list[float]]:
    """Returns coverage and precision at every threshold that separates two scores.

    Args:
      scores: Confidences, float [N].
      correct: Whether the answer is right, bool [N].
      is_known: Whether the photo shows a product of the catalogue, bool [N].
      weights: Sample weights, float [N].

    Returns:
      Points [threshold, coverage, precision], highest threshold first. Coverage is the share of
      known photos that get an answer, precision the share of answers that are right.
    """
    order = np.argsort(-scores, kind="stable")
    answered = np.cumsum(weights[order])
    right = np.cumsum((weights * correct)[order])
    coverage = np.cumsum((weights * is_known)[order]) / np.sum(weights * is_known)
    # Equal scores are accepted together: only the last of each group is a threshold.
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    return [
        [float(scores[order[i]]), float(coverage[i]), float(right[i] / answered[i])] for i in last
    ]


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Writes a calibration as JSON, atomically.

    Args:
      path: File to write.
      calibration: The calibration.
    """
    stored = {f.name: getattr(calibration, f.name) for f in dataclasses.fields(calibration)}
    novelty = calibration.novelty.to_json() if calibration.novelty else None
    write_json(path, stored | {"novelty": novelty})


def read_calibration(path: Path) -> Calibration | None:
    """Reads a calibration.

    Args:
      path: File that `write_calibration` wrote.

    Returns:
      The calibration, or None without a file (an index of fewer than `MIN_PHOTOS` validation
      photos has none).

    Raises:
      InputError: The file is of another format, or damaged.
    """
    if not path.exists():
        return None
    stored: dict[str, Any] = read_json(path, "the calibration of an index")
    if stored.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {stored.get('format')!r:.40}, this version reads {FORMAT}; "
            "build the index again"
        )
    try:
        check_field_types(Calibration, stored)
        if len(stored["weights"]) != _NUM_REGRESSORS:
            raise ValueError(f"{len(stored['weights'])} weights, wanted {_NUM_REGRESSORS}")
        novelty = stored["novelty"]
        detector = None if novelty is None else NoveltyDetector.from_json(novelty)
        return Calibration(**stored | {"novelty": detector})
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: damaged or incomplete ({one_line_error(error)}); build the index again"
        ) from error
