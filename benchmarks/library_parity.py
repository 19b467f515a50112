"""Compares our ResNets with those of torchvision, timm and Hugging Face on the same weights.

Command:  python -m benchmarks.library_parity
          (needs torch; torchvision, timm and transformers where they are installed)
Run:      python -m benchmarks.library_parity --run RUN
          (a trained run: its weights in the libraries' models, a row more)

Random weights, batch norm statistics as after training, evaluation, float32. A row for each depth:
the largest difference of embedding and logits, as a share of their largest value.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import NOT_MEASURED, missing_modules, print_machine, print_table
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.export.from_run import export_run
from sicot_jax.models.resnet import STAGES
from sicot_jax.weights.bundle import RecognizerSpec
from sicot_jax.weights.torch_names import torchvision_names
from sicot_jax.weights.visual import visual_outputs_jax

CLASSES = 1000


def torchvision_model(depth: int, classes: int) -> tuple[Any, Any]:
    """Returns the model, and photos [B, 3, H, W] -> (embedding, logits) by it."""
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


def random_arrays(library_model: Any) -> dict[str, np.ndarray]:
    """Returns the model's initial values by torchvision's names, batch norms as if trained."""
    for name, buffer in library_model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2)
    stored = library_model.state_dict()
    return {
        torch_name: stored[name].numpy() for name, torch_name in torchvision_names(stored).items()
    }


def largest_differences(
    library: str, model: RecognizerSpec, trained: dict[str, np.ndarray] | None, photos: np.ndarray
) -> str:
    """Returns the largest differences over the largest value, of embedding and logits."""
    import torch

    torch.manual_seed(model.depth)
    library_model, run = LIBRARIES[library](model.depth, model.num_classes)
    library_model.eval()
    if trained:
        state = library_model.state_dict()
        tensors = {
            name: torch.from_numpy(trained[torch_name])
            for name, torch_name in torchvision_names(state).items()
        }
        counters = {name: value for name, value in state.items() if name not in tensors}
        library_model.load_state_dict(counters | tensors)
    arrays = trained or random_arrays(library_model)
    height, width = photos.shape[1:3]
    preprocessing = Preprocessing(
        height=height, width=width, resize_height=height, resize_width=width
    )
    images = np.asarray(preprocessing.normalize(photos)).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        wanted = [output.numpy() for output in run(torch.from_numpy(np.ascontiguousarray(images)))]
    ours = visual_outputs_jax(model, preprocessing, arrays, list(photos))
    pairs = zip((ours.embedding, ours.logits), wanted, strict=True)
    return " / ".join(
        f"{np.abs(ours_output - library_output).max() / np.abs(library_output).max():.1e}"
        for ours_output, library_output in pairs
    )


def run_weights(run: Path) -> tuple[RecognizerSpec, dict[str, np.ndarray]]:
    """Returns a finished run's network by torchvision's names.

    Raises:
      InputError: the libraries have no such network.
    """
    with export_run(run) as run_export:
        model, rows = run_export.model, run_export.class_weights.named_arrays()
        arrays = run_export.arrays | {
            name: np.asarray(array)[: model.num_classes] for name, array in rows.items()
        }
    matching = RecognizerSpec(
        model.depth, 64, "imagenet", last_stride=2, embedding_width=0, num_classes=model.num_classes
    )
    if model != matching:
        raise InputError(
            f"{run}: {model}, the libraries have {matching}; train with these overrides"
        )
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

    def row(
        title: str, model: RecognizerSpec, trained: dict[str, np.ndarray] | None = None
    ) -> list[str]:
        cells = [
            f"{NOT_MEASURED} ({reason})"
            if (reason := missing_modules("torch", library))
            else largest_differences(library, model, trained, photos)
            for library in LIBRARIES
        ]
        return [title, *cells]

    rows = [
        row(f"ResNet-{depth}", RecognizerSpec(depth, 64, "imagenet", 2, 0, CLASSES))
        for depth in options.depths
    ]
    if options.run:
        model, arrays = run_weights(options.run)
        rows.append(row(f"ResNet-{model.depth}, trained", model, arrays))
    print_table("Largest difference of embedding / logits", ["network", *LIBRARIES], rows)


if __name__ == "__main__":
    main()
