"""Binary codes by hand, and what each kind of encoder guarantees."""

import numpy as np
import pytest

from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.index.storage.binary_codes import (
    CODE_KINDS,
    ITQ,
    LEARNED,
    LSH,
    PCA,
    BinaryEncoder,
    encoder_from_layer,
    fit_binary_encoder,
    itq_rotation,
)

FITTED = [kind for kind in CODE_KINDS if kind != LEARNED]


def test_code_by_hand():
    """Signs of x - (1, 1, 1) along three directions and their opposites, lowest bit first."""
    projection = np.concatenate([np.eye(3), -np.eye(3), np.eye(3)[:, :2]], 1).astype(np.float32)
    encoder = BinaryEncoder(projection, -np.ones(3, np.float32) @ projection)
    np.testing.assert_array_equal(encoder.encode(np.array([[2, 0, 3]])), [[0b01010101]])


def test_codes_match_except_for_ties():
    encoder = BinaryEncoder(np.eye(8, dtype=np.float32), np.zeros(8, np.float32))
    rows = np.array([[1, -1, 1e-7, 1, 1, 1, 1, 1]], np.float32)
    assert encoder.matches(rows, np.array([[0b11111101]], np.uint8))
    assert encoder.matches(rows, np.array([[0b11111001]], np.uint8))
    assert not encoder.matches(rows, np.array([[0b11111111]], np.uint8))


def test_encoder_is_saved_and_loaded(tmp_path):
    encoder = fit_binary_encoder(np.eye(16, dtype=np.float32), 8)
    encoder.save(tmp_path / "encoder.npz")
    again = BinaryEncoder.load(tmp_path / "encoder.npz")
    assert (again.width, again.bits) == (16, 8)
    np.testing.assert_array_equal(again.encode(np.eye(16)), encoder.encode(np.eye(16)))
    (tmp_path / "encoder.npz").write_bytes(b"no")
    with pytest.raises(InputError, match=r"no binary encoder .*; build the index again"):
        BinaryEncoder.load(tmp_path / "encoder.npz")


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("bits", [8, 16, 64, 256])
def test_near_vectors_have_near_codes(kind, bits):
    """Small noise flips few bits, another vector half; fewer bits than dimensions, and more."""
    rng = np.random.default_rng(0)
    rows = l2_normalize(rng.standard_normal((500, 32)))
    encoder = fit_binary_encoder(rows, bits, kind)
    assert encoder.bits == bits
    codes = encoder.encode(rows)
    near = encoder.encode(l2_normalize(rows + 0.05 * l2_normalize(rng.standard_normal(rows.shape))))
    flipped = np.unpackbits(codes ^ near, axis=1).mean()
    others = np.unpackbits(codes ^ np.roll(codes, 1, 0), axis=1).mean()
    assert flipped < 0.05
    assert 0.4 < others < 0.6


@pytest.mark.parametrize("kind", FITTED)
def test_vectors_without_variance_have_codes(kind):
    """One photo, or several equal ones."""
    for rows in (np.ones((1, 4)), np.ones((5, 4))):
        assert fit_binary_encoder(rows.astype(np.float32), 16, kind).encode(rows).shape == (
            len(rows),
            2,
        )


@pytest.mark.parametrize("bits", [12, 0, 8192])
def test_invalid_bits_are_refused(bits):
    with pytest.raises(InputError, match=f"bits={bits}, wanted a multiple of 8 up to 4096"):
        fit_binary_encoder(np.ones((3, 4)), bits)


def test_lsh_bits_differ_in_proportion_to_the_angle():
    """The share is t / pi (Charikar 2002); 4,096 bits, three standard errors."""
    angles = np.pi * np.array([0, 1 / 4, 1 / 2, 3 / 4])
    rows = np.stack([np.cos(angles), np.sin(angles), 0 * angles, 0 * angles], 1).astype(np.float32)
    codes = np.unpackbits(fit_binary_encoder(rows, 4096, LSH).encode(rows), axis=1)
    np.testing.assert_allclose(
        (codes[1:] != codes[0]).mean(1), [1 / 4, 1 / 2, 3 / 4], atol=3 * 0.5 / 64
    )


def error_of(rows, rotation):
    return np.square(np.sign(rows @ rotation) - rows @ rotation).sum()


def test_itq_finds_the_rotation_of_a_square():
    """Corners (+-1, +-1) rotated by 20 degrees, with noise: the error never rises."""
    angle = np.deg2rad(20)
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rng = np.random.default_rng(0)
    corners = rng.choice([-1.0, 1.0], (400, 2))
    rows = ((corners + 0.3 * rng.standard_normal(corners.shape)) @ turned.T).astype(np.float32)
    rotation, errors = np.eye(2, dtype=np.float32), []
    for _ in range(6):
        errors.append(error_of(rows, rotation))
        rotation = itq_rotation(rows, rotation, 1)
    assert np.all(np.diff(errors) <= 1e-3)
    assert errors[1] < errors[0]
    np.testing.assert_allclose(rotation, turned, atol=0.03)  # noise of 0.3 / sqrt(400) a corner
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(2), atol=1e-6)


def test_itq_has_a_smaller_error_than_a_random_rotation():
    """Vectors in the corners of a cube, in eight of twelve directions."""
    rng = np.random.default_rng(1)
    rows = rng.choice([-1.0, 1.0], (2000, 8)) @ np.linalg.qr(rng.standard_normal((12, 8)))[0].T
    rows = (rows + 0.2 * rng.standard_normal(rows.shape)).astype(np.float32)
    pca, itq = (fit_binary_encoder(rows, 8, kind) for kind in (PCA, ITQ))
    errors = [
        np.square(np.sign(scores) - scores).mean()
        for scores in (pca.scores(rows), itq.scores(rows))
    ]
    assert errors[1] < 0.6 * errors[0]


def test_encoder_from_layer_keeps_signs():
    """Directions have length 1, so that the tolerance of ties is the same for all."""
    kernel = np.array([[3, 0], [4, -2]], np.float32).repeat(4, 1)
    encoder = encoder_from_layer(kernel, np.full(8, 10, np.float32), bits=8)
    np.testing.assert_allclose(encoder.projection[:, 0], [0.6, 0.8])
    np.testing.assert_allclose(encoder.offset[[0, 4]], [2, 5])
    np.testing.assert_array_equal(encoder.encode([[-2, -1], [-4, 6]]), [[0b11110000], [0b00001111]])
    with pytest.raises(InputError, match="--bits 16 with --codes learned, and the run learned 8"):
        encoder_from_layer(kernel, np.zeros(8), bits=16)
