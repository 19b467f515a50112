"""How sure an answer is."""

import dataclasses

import numpy as np
import pytest

from sicot_jax.errors import InputError
from sicot_jax.search import novelty as typicality
from sicot_jax.search import rejection as unknown
from sicot_jax.search.rejection import Calibration, Evidence


def some(rng, count, *, probability, nearest):
    """Evidence around two values."""
    shares = np.clip(rng.normal(probability, 0.1, count), 0.01, 0.99)
    near = np.clip(rng.normal(nearest, 0.05, count), 0, 1)
    return [Evidence(float(p), float(n), float(n), 1.0) for p, n in zip(shares, near, strict=True)]


def test_a_curve_by_hand():
    """Four photos of products, weight .2 each, and one of none: at 0.5 two of the three answers are
    right.
    """
    scores, weight = np.array([0.9, 0.5, 0.5, 0.3, 0.1]), np.full(5, 0.2)
    right, known = (
        np.array([True, True, False, False, True]),
        np.array([True, True, False, True, True]),
    )
    curve = unknown.coverage_curve(scores, right, known, weight)
    np.testing.assert_allclose(
        curve, [[0.9, 0.25, 1], [0.5, 0.5, 2 / 3], [0.3, 0.75, 0.5], [0.1, 1, 0.6]], rtol=1e-12
    )


def test_certainty_by_hand():
    """log(p / (1 - p)) = 1.0986 at p = 0.75."""
    calibration = Calibration([1.0, 2.0, -3.0], 0.5, 0.5, 0.95, 0.95, 0.2, 100, [], None)
    total = 0.5 + np.log(3) + 2 * 0.6 - 3 * (0.6 - 0.4)
    for usual, share in ((1.0, 1), (0.05, 1), (0.01, 0.2)):
        assert calibration.certainty(Evidence(0.75, 0.6, 0.4, usual)) == pytest.approx(
            share / (1 + np.exp(-total))
        )
    for extreme in (0.0, 1.0):
        assert 0 <= calibration.certainty(Evidence(extreme, 0, 0, 1)) <= 1


def test_what_can_be_told_apart_is():
    """Right answers are near, wrong ones and unknown photos far: the precision is reached with
    nearly full coverage, and certainties are near the shares of right answers.
    """
    rng = np.random.default_rng(0)
    known = some(rng, 400, probability=0.8, nearest=0.9) + some(
        rng, 100, probability=0.5, nearest=0.5
    )
    right = [True] * 400 + [False] * 100
    fitted = unknown.fit(known, right, some(rng, 300, probability=0.6, nearest=0.4))
    assert fitted.reached >= 0.95
    fresh = some(rng, 400, probability=0.8, nearest=0.9)
    absent = some(rng, 300, probability=0.6, nearest=0.4)
    assert np.mean([fitted.certainty(e) >= fitted.threshold for e in fresh]) > 0.95
    assert np.mean([fitted.certainty(e) >= fitted.threshold for e in absent]) < 0.05
    coverage = [point[1] for point in fitted.curve]
    assert coverage == sorted(coverage)
    assert coverage[-1] == 1


def test_certainties_are_calibrated():
    """Where nothing tells right from wrong, the certainty is the share of right answers: 0.8 x 0.5."""
    rng = np.random.default_rng(0)
    known = some(rng, 4000, probability=0.6, nearest=0.6)
    right = (rng.random(4000) < 0.5).tolist()
    fitted = unknown.fit(known, right, some(rng, 4000, probability=0.6, nearest=0.6))
    assert np.mean([fitted.certainty(e) for e in known]) == pytest.approx(0.4, abs=0.02)
    assert fitted.reached < 0.6  # and says that 0.95 is not to be had


def test_all_right_or_all_wrong_is_fitted_too():
    rng = np.random.default_rng(0)
    known = some(rng, 60, probability=0.6, nearest=0.6)
    fitted = unknown.fit(known, [False] * 60, known)
    assert fitted.weights == [0.0, 0.0, 0.0]
    assert fitted.certainty(known[0]) < 1e-5


def test_a_file_of_a_calibration(tmp_path):
    calibration = Calibration(
        [1.0, 2.0, 3.0], 0.5, 0.4, 0.95, 0.96, 0.2, 100, [[0.4, 0.9, 0.96]], None
    )
    path = tmp_path / "unknown.json"
    assert unknown.read_calibration(path) is None
    unknown.write_calibration(path, calibration)
    assert unknown.read_calibration(path) == calibration
    rng = np.random.default_rng(0)
    photos = rng.normal(size=(40, 6))
    with_typicality = dataclasses.replace(calibration, typicality=typicality.fit(photos))
    unknown.write_calibration(path, with_typicality)
    read = unknown.read_calibration(path)
    assert [read.usual(x + 0.1) for x in photos] == [with_typicality.usual(x + 0.1) for x in photos]
    assert dataclasses.replace(read, typicality=None) == calibration
    path.write_text(path.read_text().replace('"rest"', '"other"'))
    with pytest.raises(InputError, match="not as it was written"):
        unknown.read_calibration(path)
    path.write_text('{"format": 7}')
    with pytest.raises(InputError, match="format 7, this version reads 2"):
        unknown.read_calibration(path)
