"""Calibrated confidence and open-set rejection."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.damage import damaged_bytes, damaged_json, result_or_one_line
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.errors import InputError
from sicot_jax.search.novelty import fit_novelty_detector
from sicot_jax.search.rejection import (
    Calibration,
    ConfidenceFeatures,
    coverage_curve,
    fit_calibration,
    read_calibration,
    write_calibration,
)


def random_features(rng, count, *, probability, nearest):
    """Features that scatter around two values."""
    shares = np.clip(rng.normal(probability, 0.1, count), 0.01, 0.99)
    near = np.clip(rng.normal(nearest, 0.05, count), 0, 1)
    return [
        ConfidenceFeatures(float(p), float(n), float(n), 1.0)
        for p, n in zip(shares, near, strict=True)
    ]


def test_a_curve_by_hand():
    """Four photos of products, weight 0.2 each, and one of none: at threshold 0.5 two of the three
    answers are right.
    """
    scores, weight = np.array([0.9, 0.5, 0.5, 0.3, 0.1]), np.full(5, 0.2)
    correct, is_known = (
        np.array([True, True, False, False, True]),
        np.array([True, True, False, True, True]),
    )
    curve = coverage_curve(scores, correct, is_known, weight)
    np.testing.assert_allclose(
        curve, [[0.9, 0.25, 1], [0.5, 0.5, 2 / 3], [0.3, 0.75, 0.5], [0.1, 1, 0.6]], rtol=1e-12
    )


def test_confidence_by_hand():
    """log(p / (1 - p)) = 1.0986 at p = 0.75."""
    calibration = Calibration([1.0, 2.0, -3.0], 0.5, 0.5, 0.95, 0.95, 0.2, 100, [], None)
    total = 0.5 + np.log(3) + 2 * 0.6 - 3 * (0.6 - 0.4)
    for p_value, factor in ((1.0, 1), (0.05, 1), (0.01, 0.2)):
        assert calibration.confidence(ConfidenceFeatures(0.75, 0.6, 0.4, p_value)) == pytest.approx(
            factor / (1 + np.exp(-total))
        )
    for extreme in (0.0, 1.0):
        assert 0 <= calibration.confidence(ConfidenceFeatures(extreme, 0, 0, 1)) <= 1


def test_separable_photos_reach_the_precision_with_nearly_full_coverage():
    """Right answers are near their product's photos; wrong ones, and photos of none, are far."""
    rng = np.random.default_rng(0)
    known = random_features(rng, 400, probability=0.8, nearest=0.9) + random_features(
        rng, 100, probability=0.5, nearest=0.5
    )
    right = [True] * 400 + [False] * 100
    fitted = fit_calibration(known, right, random_features(rng, 300, probability=0.6, nearest=0.4))
    assert fitted.precision >= 0.95
    fresh = random_features(rng, 400, probability=0.8, nearest=0.9)
    absent = random_features(rng, 300, probability=0.6, nearest=0.4)
    assert np.mean([fitted.confidence(e) >= fitted.threshold for e in fresh]) > 0.95
    assert np.mean([fitted.confidence(e) >= fitted.threshold for e in absent]) < 0.05
    coverage = [point[1] for point in fitted.curve]
    assert coverage == sorted(coverage)
    assert coverage[-1] == 1


def test_confidences_are_calibrated():
    """Features that carry no signal: the confidence is the share of right answers, 0.8 x 0.5."""
    rng = np.random.default_rng(0)
    known = random_features(rng, 4000, probability=0.6, nearest=0.6)
    right = (rng.random(4000) < 0.5).tolist()
    fitted = fit_calibration(known, right, random_features(rng, 4000, probability=0.6, nearest=0.6))
    assert np.mean([fitted.confidence(e) for e in known]) == pytest.approx(0.4, abs=0.02)
    assert fitted.precision < 0.6  # the target of 0.95 cannot be reached


def test_answers_that_are_all_wrong_are_fitted_too():
    rng = np.random.default_rng(0)
    known = random_features(rng, 60, probability=0.6, nearest=0.6)
    fitted = fit_calibration(known, [False] * 60, known)
    assert fitted.weights == [0.0, 0.0, 0.0]
    assert fitted.confidence(known[0]) < 1e-5


def test_a_calibration_is_read_as_written(tmp_path):
    calibration = Calibration(
        [1.0, 2.0, 3.0], 0.5, 0.4, 0.95, 0.96, 0.2, 100, [[0.4, 0.9, 0.96]], None
    )
    path = tmp_path / "rejection.json"
    assert read_calibration(path) is None
    write_calibration(path, calibration)
    assert read_calibration(path) == calibration
    rng = np.random.default_rng(0)
    photos = rng.normal(size=(40, 6))
    with_novelty = dataclasses.replace(calibration, novelty=fit_novelty_detector(photos))
    write_calibration(path, with_novelty)
    read = read_calibration(path)
    assert [read.p_value(x + 0.1) for x in photos] == [
        with_novelty.p_value(x + 0.1) for x in photos
    ]
    assert dataclasses.replace(read, novelty=None) == calibration
    path.write_text(path.read_text().replace('"residual_variance"', '"other"'))
    with pytest.raises(InputError, match="damaged or incomplete"):
        read_calibration(path)
    path.write_text('{"format": 7}')
    with pytest.raises(InputError, match="format 7, this version reads 3"):
        read_calibration(path)


STORED = {
    "weights": [1.0, 2.0, 3.0],
    "intercept": 0.5,
    "threshold": 0.4,
    "target_precision": 0.95,
    "precision": 0.96,
    "open_set_prior": 0.2,
    "num_photos": 100,
    "curve": [[0.4, 0.9, 0.96]],
    "novelty": fit_novelty_detector(np.random.default_rng(0).normal(size=(16, 3))).to_json(),
    "format": 3,
}


@given(
    damaged_json(STORED).map(str.encode)
    | damaged_bytes(json.dumps(STORED, indent=1).encode())
    | st.binary(max_size=60)
)
def test_a_damaged_calibration_is_an_error_of_one_line_or_works(tmp_path, content):
    path = tmp_path / "rejection.json"
    path.write_bytes(json.dumps(STORED).encode())
    assert read_calibration(path) is not None
    path.write_bytes(content)
    calibration = result_or_one_line(lambda: read_calibration(path))
    if calibration is not None:
        assert calibration.confidence(ConfidenceFeatures(0.5, 0.6, 0.4, 0.5)) is not None


def test_a_deeply_nested_file_is_an_error_of_one_line(tmp_path):
    (tmp_path / "rejection.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="RecursionError, wanted the calibration of an index"):
        read_calibration(tmp_path / "rejection.json")
