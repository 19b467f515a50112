"""Hugging Face's ResNets, imported: the same embeddings on the same photos."""

import numpy as np
import pytest

from sicot_jax.cli import main as cli
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.weights.bundle import RecognizerSpec, read_bundle
from sicot_jax.weights.parity import parity_photos
from sicot_jax.weights.safetensors_io import read_weights
from sicot_jax.weights.visual import visual_outputs_jax

torch = pytest.importorskip("torch", reason="conversion needs the extra torch")
transformers = pytest.importorskip(
    "transformers", reason="Hugging Face's models are compared with themselves"
)
BLOCKS = {
    18: [2, 2, 2, 2],
    34: [3, 4, 6, 3],
    50: [3, 4, 6, 3],
    101: [3, 4, 23, 3],
    152: [3, 8, 36, 3],
}


@pytest.mark.parametrize(
    "depth",
    [
        18,
        pytest.param(34, marks=pytest.mark.slow),
        *(pytest.param(d, marks=pytest.mark.slow) for d in (50, 101, 152)),
    ],
)
def test_embeddings_equal_those_of_hugging_face(tmp_path, depth):
    """A quarter of the width, batch norms as after training, saved by `save_pretrained`."""
    torch.manual_seed(depth)
    bottleneck = depth >= 50
    config = transformers.ResNetConfig(
        depths=BLOCKS[depth],
        layer_type="bottleneck" if bottleneck else "basic",
        embedding_size=16,
        hidden_sizes=[16 * 2**stage * (4 if bottleneck else 1) for stage in range(4)],
        num_labels=7,
    )
    library_model = transformers.ResNetForImageClassification(config).eval()
    for name, buffer in library_model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2)
    library_model.save_pretrained(tmp_path / "library")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    processor = {
        "image_mean": mean,
        "image_std": std,
        "size": {"shortest_edge": 96},
        "crop_pct": 0.75,
    }
    transformers.ConvNextImageProcessor(**processor).save_pretrained(tmp_path / "library")

    out = tmp_path / "out"
    assert cli.main(["convert", "from-torch", str(tmp_path / "library"), f"--out={out}"]) == 0
    bundle = read_bundle(out)
    assert bundle.model == RecognizerSpec(depth, 16, "imagenet", 2, 0, 0)
    assert bundle.preprocessing == Preprocessing(96, 96, 128, 128, mean=mean, std=std)

    photos = parity_photos()[:3]
    pixels = np.stack(
        [bundle.preprocessing.centre_crop(bundle.preprocessing.load(photo)) for photo in photos]
    )
    images = (pixels.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    with torch.inference_mode():
        expected = (
            library_model.resnet(torch.from_numpy(images.transpose(0, 3, 1, 2)))
            .pooler_output.flatten(1)
            .numpy()
        )
    arrays = read_weights(out / "model.safetensors")
    actual = visual_outputs_jax(bundle.model, bundle.preprocessing, arrays, photos).embedding
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
