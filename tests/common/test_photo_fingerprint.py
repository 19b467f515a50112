"""Near-identical photos: copies are found, different pictures are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from sicot_jax.common import photo_fingerprint as module
from sicot_jax.common.photo_fingerprint import (
    FINGERPRINT_BYTES,
    near_identical,
    photo_fingerprint,
)


def scene(seed):
    """A picture of 240 x 240 with blots of colour."""
    blots = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize((240, 240), Image.Resampling.BICUBIC)


def copy_of(photo, side, quality):
    out = io.BytesIO()
    photo.resize((side, side), Image.Resampling.LANCZOS).save(out, "JPEG", quality=quality)
    return Image.open(out).convert("RGB")


def fingerprints(photos):
    prints = [photo_fingerprint(photo) for photo in photos]
    assert {len(data) for data in prints} == {FINGERPRINT_BYTES}
    return np.frombuffer(b"".join(prints), np.uint8).reshape(len(photos), -1)


def test_resized_and_recompressed_copies_are_found_and_other_pictures_are_not():
    photos, pictures = [], []
    for picture in range(5):
        photo = scene(picture)
        copies = [
            copy_of(photo, side, quality) for side, quality in ((240, 60), (150, 80), (75, 85))
        ]
        photos += [photo, *copies]
        pictures += [picture] * 4
    order = np.random.default_rng(0).permutation(len(photos))
    groups = near_identical(fingerprints([photos[i] for i in order]))
    pictures = np.array(pictures)[order]
    np.testing.assert_array_equal(groups[:, None] == groups, pictures[:, None] == pictures)


def test_the_same_shape_in_another_colour_is_another_picture():
    shapes = []
    for colour in ("red", "green"):
        shape = Image.new("RGB", (64, 64), "white")
        shape.paste(colour, (16, 16, 48, 48))
        shapes.append(shape)
    assert len(set(near_identical(fingerprints(shapes)))) == 2


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_copies_of_copies_are_one_group(monkeypatch, block):
    """A chain: each is near to the next one alone, in any order and over blocks."""
    monkeypatch.setattr(module, "_BLOCK", block)
    chain = (
        np.full((20, FINGERPRINT_BYTES), 100, np.uint8) + 2 * np.arange(20, dtype=np.uint8)[:, None]
    )
    far = np.full((2, FINGERPRINT_BYTES), 250, np.uint8) - np.array([[0], [60]], np.uint8)
    order = np.random.default_rng(1).permutation(22)
    groups = near_identical(np.concatenate([chain, far])[order])
    is_chain = order < 20
    assert len(set(groups[is_chain])) == 1
    assert len(set(groups)) == 3


def test_groups_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (30, FINGERPRINT_BYTES))
    noise = rng.integers(-2, 3, (120, FINGERPRINT_BYTES))
    prints = np.clip(pictures[rng.integers(0, 30, 120)] + noise, 0, 255).astype(np.uint8)
    distances = np.square(prints[:, None].astype(float) - prints).mean(-1) ** 0.5
    graph = distances <= module.MAX_DIFFERENCE
    wanted = sparse.csgraph.connected_components(graph, directed=False)[1]
    groups = near_identical(prints)
    np.testing.assert_array_equal(groups[:, None] == groups, wanted[:, None] == wanted)
    assert 1 < len(set(groups)) < 120


def test_no_photo_and_one_photo():
    assert near_identical(np.zeros((0, FINGERPRINT_BYTES), np.uint8)).tolist() == []
    assert len(near_identical(np.zeros((1, FINGERPRINT_BYTES), np.uint8))) == 1
