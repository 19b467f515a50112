"""How far our ResNets are from torchvision's, timm's and Hugging Face's own on the same weights.

    python -m benchmarks.parity              (needs torch; torchvision, timm and transformers where they are installed)

Random weights, batch norm statistics as after training, evaluation, float32. A row for each depth: the largest difference of
the embedding as a share of its largest value.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.timing import NOT_MEASURED, missing, print_machine, print_table
from sicot_jax.convert import names, network
from sicot_jax.convert.folder import Model
from sicot_jax.models.resnet import STAGES


def torchvision_model(depth: int) -> tuple[Any, Any]:
    """The model, and photos [B, 3, H, W] -> embedding by it."""
    import torchvision

    model = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    return model, lambda images: _all_but_last(model)(images).flatten(1)


def _all_but_last(model: Any) -> Any:
    import torch

    return torch.nn.Sequential(*list(model.children())[:-1])


def timm_model(depth: int) -> tuple[Any, Any]:
    import timm

    model = timm.create_model(f"resnet{depth}", zero_init_last=False)
    return model, lambda images: model.forward_head(model.forward_features(images), pre_logits=True)


def hugging_face_model(depth: int) -> tuple[Any, Any]:
    from transformers import ResNetConfig, ResNetForImageClassification

    bottleneck = depth >= 50
    sizes = [64 * 2**stage * (4 if bottleneck else 1) for stage in range(4)]
    kind = "bottleneck" if bottleneck else "basic"
    model = ResNetForImageClassification(ResNetConfig(depths=STAGES[depth], layer_type=kind, hidden_sizes=sizes))
    return model, lambda images: model.resnet(images).pooler_output.flatten(1)


LIBRARIES = {"torchvision": torchvision_model, "timm": timm_model, "transformers": hugging_face_model}


def difference(library: str, depth: int, *, photos: int, size: int) -> float:
    """Largest difference of the embedding over its largest value."""
    import torch

    torch.manual_seed(depth)
    theirs, embed_there = LIBRARIES[library](depth)
    for name, buffer in theirs.eval().named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2)
    images = torch.rand(photos, 3, size, size) * 2 - 1
    with torch.inference_mode():
        wanted = embed_there(images).numpy()
    stored = theirs.state_dict()
    arrays = {to: stored[name].numpy() for name, to in names.torchvision_names(stored).items()}
    model = Model(depth, 64, "imagenet", last_stride=2, embedding_width=0, classes=0)
    graphdef, *trees = nnx.split(nnx.eval_shape(lambda: network.fresh_stream(model)), nnx.Param, nnx.BatchStat)
    params, stats = (network.filled(nnx.to_pure_dict(tree), arrays) for tree in trees)
    embed = jax.jit(lambda image: nnx.merge(graphdef, params, stats, copy=True).embed(image, train=False))
    with jax.default_matmul_precision("highest"):
        found = np.asarray(embed(images.permute(0, 2, 3, 1).numpy()))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=list(STAGES))
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--size", type=int, default=160, help="pixels a side")
    options = parser.parse_args()
    print_machine()

    def cell(library: str, depth: int) -> str:
        if why := missing("torch", library):
            return f"{NOT_MEASURED} ({why})"
        return f"{difference(library, depth, photos=options.photos, size=options.size):.1e}"

    rows = [[f"ResNet-{depth}", *(cell(library, depth) for library in LIBRARIES)] for depth in options.depths]
    print_table("Largest difference of the embedding", ["network", *LIBRARIES], rows)


if __name__ == "__main__":
    main()
