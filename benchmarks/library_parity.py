"""How far our ResNets are from torchvision's, timm's and Hugging Face's own on the same weights.

    python -m benchmarks.library_parity              (needs torch; torchvision, timm and transformers where
    they are installed) python -m benchmarks.library_parity --run RUN    (a trained run: its weights in the
    libraries' models, a row more)

Random weights, batch norm statistics as after training, evaluation, float32. A row for each depth:
the largest difference of embedding and logits, as a share of their largest value.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import NOT_MEASURED, missing, print_machine, print_table
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.export.from_run import exported
from sicot_jax.models.resnet import STAGES
from sicot_jax.weights import torch_names as names
from sicot_jax.weights import visual as network
from sicot_jax.weights.bundle import Model

CLASSES = 1000


def torchvision_model(depth: int, classes: int) -> tuple[Any, Any]:
    """The model, and photos [B, 3, H, W] -> (embedding, logits) by it."""
    import torch
    import torchvision

    model = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=classes)

    def run(images):
        backbone = torch.nn.Sequential(*list(model.children())[:-1])
        return backbone(images).flatten(1), model(images)

    return model, run


def timm_model(depth: int, classes: int) -> tuple[Any, Any]:
    import timm

    model = timm.create_model(f"resnet{depth}", zero_init_last=False, num_classes=classes)
    return model, lambda images: (
        model.forward_head(model.forward_features(images), pre_logits=True),
        model(images),
    )


def hugging_face_model(depth: int, classes: int) -> tuple[Any, Any]:
    from transformers import ResNetConfig, ResNetForImageClassification

    bottleneck = depth >= 50
    sizes = [64 * 2**stage * (4 if bottleneck else 1) for stage in range(4)]
    kind = "bottleneck" if bottleneck else "basic"
    config = ResNetConfig(
        depths=STAGES[depth], layer_type=kind, hidden_sizes=sizes, num_labels=classes
    )
    model = ResNetForImageClassification(config)
    return model, lambda images: (
        model.resnet(images).pooler_output.flatten(1),
        model(images).logits,
    )


LIBRARIES = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "transformers": hugging_face_model,
}


def random_arrays(theirs: Any) -> dict[str, np.ndarray]:
    """The model's starting values by torchvision's names, its batch norms made to look trained."""
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2)
    stored = theirs.state_dict()
    return {to: stored[name].numpy() for name, to in names.torchvision_names(stored).items()}


def difference(
    library: str, model: Model, trained: dict[str, np.ndarray] | None, photos: np.ndarray
) -> str:
    """Largest differences over the largest value, of embedding and logits."""
    import torch

    torch.manual_seed(model.depth)
    theirs, run = LIBRARIES[library](model.depth, model.classes)
    theirs.eval()
    if trained:
        state = theirs.state_dict()
        given = {
            name: torch.from_numpy(trained[to])
            for name, to in names.torchvision_names(state).items()
        }
        counters = {name: value for name, value in state.items() if name not in given}
        theirs.load_state_dict(counters | given)
    arrays = trained or random_arrays(theirs)
    height, width = photos.shape[1:3]
    preprocessing = Preprocessing(
        height=height, width=width, resize_height=height, resize_width=width
    )
    images = np.asarray(preprocessing.normalise(photos)).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        wanted = [output.numpy() for output in run(torch.from_numpy(np.ascontiguousarray(images)))]
    ours = network.outputs_here(model, preprocessing, arrays, list(photos))
    pairs = zip((ours.embedding, ours.logits), wanted, strict=True)
    return " / ".join(
        f"{np.abs(found - there).max() / np.abs(there).max():.1e}" for found, there in pairs
    )


def weights_of(run: Path) -> tuple[Model, dict[str, np.ndarray]]:
    """A finished run's network by torchvision's names. InputError where the libraries have none
    like it.
    """
    with exported(run) as found:
        model, rows = (
            found.model,
            {"fc.weight": found.classifier.kernel, "fc.bias": found.classifier.bias},
        )
        arrays = found.arrays | {
            name: np.asarray(array)[: model.classes] for name, array in rows.items()
        }
    alike = Model(
        model.depth, 64, "imagenet", last_stride=2, embedding_width=0, classes=model.classes
    )
    if model != alike:
        raise InputError(f"{run}: {model}, the libraries have {alike}; train with these overrides")
    return model, {name: np.array(array) for name, array in arrays.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", nargs="+", type=int, default=list(STAGES))
    parser.add_argument(
        "--run",
        type=Path,
        help="a finished run: ResNet of 64 channels, imagenet stem, no projection",
    )
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--size", type=int, default=160, help="pixels a side")
    options = parser.parse_args()
    print_machine()
    photos = np.random.default_rng(0).integers(
        0, 256, (options.photos, options.size, options.size, 3), np.uint8
    )

    def row(title: str, model: Model, trained: dict[str, np.ndarray] | None = None) -> list[str]:
        cells = [
            f"{NOT_MEASURED} ({why})"
            if (why := missing("torch", library))
            else difference(library, model, trained, photos)
            for library in LIBRARIES
        ]
        return [title, *cells]

    rows = [
        row(f"ResNet-{depth}", Model(depth, 64, "imagenet", 2, 0, CLASSES))
        for depth in options.depths
    ]
    if options.run:
        model, arrays = weights_of(options.run)
        rows.append(row(f"ResNet-{model.depth}, trained", model, arrays))
    print_table("Largest difference of embedding / logits", ["network", *LIBRARIES], rows)


if __name__ == "__main__":
    main()
