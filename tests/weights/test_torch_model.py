"""The exported model.py decodes every photo as the product does, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.photo_zoo import colours, photo_zoo
from PIL import Image

from sicot_jax.common.image import (
    MAX_PIXELS,
    PHOTO_FORMATS,
    ImageError,
    decode_photo,
    photo_pixels,
)
from sicot_jax.config.preprocessing import Preprocessing

torch_model = pytest.importorskip(
    "sicot_jax.weights.templates.torch_model", reason="the exported model.py needs torch"
)

SETTINGS = Preprocessing(height=12, width=10, resize_height=16, resize_width=14)


@pytest.mark.parametrize("name", photo_zoo())
def test_photos_of_the_zoo_equal_the_product(name, tmp_path):
    data = photo_zoo()[name]
    path = tmp_path / "photo"
    path.write_bytes(data)
    if name.startswith("refused"):
        with pytest.raises(ImageError):
            decode_photo(data)
        with pytest.raises(ValueError, match="photo: "):
            torch_model.upright_rgb(torch_model.open_photo(path))
        return
    decoded = np.asarray(torch_model.upright_rgb(torch_model.open_photo(path)))
    assert decoded.shape == decode_photo(data).shape
    assert decoded.tobytes() == decode_photo(data).tobytes()


def test_formats_and_limits_are_those_of_the_product(tmp_path):
    assert torch_model.PHOTO_FORMATS == PHOTO_FORMATS
    assert torch_model.MAX_PIXELS == MAX_PIXELS
    Image.new("1", (10_001, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="photo: 10001 x 10000 pixels, at most 100000000"):
        torch_model.open_photo(tmp_path / "large.png")


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("name", ["damaged EXIF", "16-bit grey", "wide colours and alpha"])
def test_the_network_input_equals_the_product(name, fit, tmp_path):
    settings = {**vars(SETTINGS), "fit": fit}
    model = {"depth": 18, "width": 2, "stem": "small", "last_stride": 2}
    model |= {"embedding_width": 0, "num_classes": 0}
    recognizer = torch_model.SicotRecognizer(model, settings, [])
    data = photo_zoo()[name]
    path = tmp_path / "photo"
    path.write_bytes(data)
    product = Preprocessing(**settings)
    expected = product.normalize(product.batch([data]))[0]
    with Image.open(path) as opened:
        for photo in (path, opened, decode_photo(data)):
            network_input = recognizer.preprocess(photo).permute(1, 2, 0).numpy()
            np.testing.assert_allclose(network_input, expected, atol=1e-6)


def test_a_pillow_image_in_memory_equals_the_product():
    for mode in ("RGB", "L", "CMYK", "1", "P", "RGBA", "I;16", "I"):
        photo = colours().convert("L").convert(mode) if mode[0] == "I" else colours().convert(mode)
        np.testing.assert_array_equal(
            np.asarray(torch_model.upright_rgb(photo)), photo_pixels(photo)
        )
