"""Names and shapes of a ResNet's arrays: ours, torchvision's (timm has the same) and Hugging
Face's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.models.resnet import STAGES

Shapes = Mapping[str, tuple[int, ...]]

PARTS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTERS = ".num_batches_tracked"  # of torch's batch norms: nothing here reads them


@dataclasses.dataclass(frozen=True)
class Backbone:
    """What the arrays of a ResNet tell of it. `kernel` is the size of the first convolution; its
    stride is not told.
    """

    depth: int
    width: int
    kernel: int


def torchvision_name(path: str) -> str:
    """ "stages/0/1/convs/0/kernel" (below "visual/resnet") -> "layer1.1.conv1.weight"."""
    found = re.fullmatch(r"(?:stages/(\d+)/(\d+)/)?(.+)/(\w+)", path)
    assert found is not None, path
    stage, block, module, part = found.groups()
    place = f"layer{int(stage) + 1}.{block}." if stage is not None else ""
    if module == "downsample":
        return f"{place}downsample.0.weight"
    if module == "downsample_norm":
        return f"{place}downsample.1.{PARTS[part]}"
    if numbered := re.fullmatch(r"(conv|norm)(?:s/)?(\d+)", module):
        kind, number = numbered[1], int(numbered[2]) + (stage is not None)
        return (
            f"{place}conv{number}.weight" if kind == "conv" else f"{place}bn{number}.{PARTS[part]}"
        )
    raise AssertionError(path)


def box_name(path: str) -> str:
    """ "convs/0/kernel" (below "visual/localization") -> "box.conv1.weight"; the batch norm behind all of
    these is "box.bn".
    """
    module, _, part = path.rpartition("/")
    if module.startswith("convs/"):
        return f"box.conv{int(module.removeprefix('convs/')) + 1}.weight"
    if module == "norm":
        return f"box.bn.{PARTS[part]}"
    return (
        f"box.score.{'weight' if part == 'kernel' else part}"
        if module == "score"
        else f"box.{path}"
    )


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """[k, k, I, O] -> [O, I, k, k]; [I, O] -> [O, I]; vectors as they are."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """The way back from `to_torch_layout`."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def torchvision_names(names: Iterable[str]) -> dict[str, str]:
    """Each name of a weights file -> torchvision's for it; names that mean nothing here stay as
    they are.

    Knows torchvision's and timm's (the same), Hugging Face's `ResNetModel` and
    `ResNetForImageClassification`, and what `DistributedDataParallel` puts before each. Counters of
    batches are left out.
    """
    names = [name for name in names if not name.endswith(_COUNTERS)]
    prefix = "module." if names and all(name.startswith("module.") for name in names) else ""
    return {name: _from_hugging_face(name.removeprefix(prefix)) for name in names}


def _from_hugging_face(name: str) -> str:
    if name.startswith("classifier.1."):
        return name.replace("classifier.1.", "fc.")
    name = re.sub(r"^resnet\.(?=embedder\.|encoder\.)", "", name)
    found = re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name)
    if found:
        return f"{'conv1' if found[1] == 'convolution' else 'bn1'}.{found[2]}"
    found = re.fullmatch(
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(shortcut|layer\.\d+)\.(convolution|normalization)\.(\w+)",
        name,
    )
    if not found:
        return name
    stage, block, module, kind, part = found.groups()
    place = f"layer{int(stage) + 1}.{block}"
    if module == "shortcut":
        return f"{place}.downsample.{int(kind == 'normalization')}.{part}"
    number = int(module.removeprefix("layer.")) + 1
    return f"{place}.{'conv' if kind == 'convolution' else 'bn'}{number}.{part}"


def backbone_of(shapes: Shapes) -> Backbone:
    """Depth, width and first kernel by torchvision's names. InputError where they are no ResNet of
    ours.
    """
    first = shapes.get("conv1.weight", ())
    blocks = tuple(
        len({found[1] for name in shapes if (found := re.match(rf"layer{stage}\.(\d+)\.", name))})
        for stage in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in shapes
    depths = [
        depth
        for depth, of_stage in STAGES.items()
        if of_stage == blocks and (depth >= 50) == bottleneck
    ]
    if len(first) != 4 or first[1] != 3 or not depths:
        listed = ", ".join(sorted(shapes)[:3]) or "none"
        raise InputError(
            f"no ResNet-{'/'.join(map(str, STAGES))}: blocks in its stages {blocks}, arrays {listed}, ...; wanted weights with "
            "the names of torchvision, timm or Hugging Face"
        )
    return Backbone(depths[0], first[0], first[2])


def mismatches(found: Shapes, wanted: Shapes, *, may_be_missing: Sequence[str] = ()) -> str:
    """Everything that is missing, unexpected or of another shape, one line; "" where nothing is.

    `may_be_missing`: beginnings of names that need not be there.
    """
    missing = sorted(
        name
        for name in wanted.keys() - found.keys()
        if not name.startswith(tuple(may_be_missing) or ("\0",))
    )
    unexpected = sorted(found.keys() - wanted.keys())
    shaped = [
        f"{name} is {found[name]}, wanted {wanted[name]}"
        for name in sorted(found.keys() & wanted.keys())
        if tuple(found[name]) != tuple(wanted[name])
    ]
    parts = {"missing": missing, "unexpected": unexpected, "of another shape": shaped}
    return "; ".join(
        f"{len(listed)} {what}: {', '.join(listed)}" for what, listed in parts.items() if listed
    )
