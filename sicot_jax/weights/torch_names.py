"""Translates names and layouts of ResNet arrays: ours, torchvision's, timm's, Hugging Face's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sicot_jax.errors import InputError
from sicot_jax.models.resnet import STAGES

Shapes = Mapping[str, tuple[int, ...]]

BATCH_NORM_PARTS = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# The first convolution's name, a prefix before it, and an array of the first block with the same
# prefix: by torchvision and by Hugging Face.
_FIRST_ARRAYS = (
    (re.compile(r"(.*?)()conv1\.weight"), "layer1.0.conv1.weight"),
    (
        re.compile(r"(.*?)(resnet\.)?embedder\.embedder\.convolution\.weight"),
        "encoder.stages.0.layers.0.layer.0.convolution.weight",
    ),
)
_BATCH_COUNTER = ".num_batches_tracked"  # of torch's batch norms; nothing here reads it


@dataclasses.dataclass(frozen=True)
class BackboneShape:
    """Architecture of a ResNet as the shapes of its arrays show it.

    Attributes:
      depth: Number of layers.
      width: Channels of the first stage.
      first_kernel: Side of the first convolution; its stride cannot be seen in the shapes.
    """

    depth: int
    width: int
    first_kernel: int


def backbone_array_name(path: str) -> str:
    """Returns torchvision's name of an array of our ResNet.

    Args:
      path: Path below "visual/resnet", such as "stages/0/1/convs/0/kernel".

    Returns:
      The name, such as "layer1.1.conv1.weight".
    """
    parts = re.fullmatch(r"(?:stages/(\d+)/(\d+)/)?(.+)/(\w+)", path)
    assert parts is not None, path
    stage, block, module, part = parts.groups()
    prefix = f"layer{int(stage) + 1}.{block}." if stage is not None else ""
    if module == "downsample":
        return f"{prefix}downsample.0.weight"
    if module == "downsample_norm":
        return f"{prefix}downsample.1.{BATCH_NORM_PARTS[part]}"
    if numbered := re.fullmatch(r"(conv|norm)(?:s/)?(\d+)", module):
        number = int(numbered[2]) + (stage is not None)
        if numbered[1] == "conv":
            return f"{prefix}conv{number}.weight"
        return f"{prefix}bn{number}.{BATCH_NORM_PARTS[part]}"
    raise AssertionError(path)


def localization_array_name(path: str) -> str:
    """Returns the name of an array of the localisation branch in the PyTorch module.

    Args:
      path: Path below "visual/localization", such as "convs/0/kernel".

    Returns:
      The name, such as "localization.conv1.weight".
    """
    module, _, part = path.rpartition("/")
    if module.startswith("convs/"):
        return f"localization.conv{int(module.removeprefix('convs/')) + 1}.weight"
    if module == "norm":
        return f"localization.bn.{BATCH_NORM_PARTS[part]}"
    if module == "score":
        return f"localization.score.{'weight' if part == 'kernel' else part}"
    return f"localization.{path}"


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """Transposes an array from our layout to torch's.

    Args:
      array: Kernel [k, k, I, O] or [I, O], or a vector.

    Returns:
      View [O, I, k, k] or [O, I]; vectors unchanged.
    """
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """Transposes an array from torch's layout to ours, the inverse of `to_torch_layout`.

    Args:
      array: Weight [O, I, k, k] or [O, I], or a vector.

    Returns:
      View [k, k, I, O] or [I, O]; vectors unchanged.
    """
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def torchvision_names(names: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Returns torchvision's name for each array of a weights file.

    Knows torchvision's and timm's names (the same) and those of Hugging Face's `ResNetModel` and
    `ResNetForImageClassification`, all with any prefix: "module." of `DistributedDataParallel`,
    "_orig_mod." of `torch.compile`, "backbone." or "model." of a network around the ResNet.

    Args:
      names: Names in the file.
      prefix: The prefix of the ResNet to take, whose end may be left out; arrays without it are
        left out. By default that of the only ResNet in the file.

    Returns:
      File name -> torchvision's name; unknown names stay as they are, batch counters are left
      out.

    Raises:
      InputError: Several ResNets, other arrays beside the one with a prefix, or no array with
        `prefix`.
    """
    names = [name for name in names if not name.endswith(_BATCH_COUNTER)]
    prefixes = _resnet_prefixes(names)
    if prefix:
        prefix = prefix.removesuffix(".") + "."
        names = [name for name in names if name.startswith(prefix)]
        if not names:
            raise InputError(
                f"no array with the prefix {prefix}; wanted "
                f"{' or '.join(filter(None, prefixes)) or 'none, the names have no prefix'}"
            )
        # The prefix may stand for the network around the ResNet.
        prefixes = [one for one in prefixes if one.startswith(prefix)] or [prefix]
    if len(prefixes) > 1:
        raise InputError(
            f"several ResNets, before whose names stand {', '.join(map(repr, prefixes))}; "
            "say which with --prefix"
        )
    stripped = prefixes[0] if prefixes else ""
    renamed = {name: _from_hugging_face(name.removeprefix(stripped)) for name in names}
    if others := sorted(name for name in names if not name.startswith(stripped)):
        raise InputError(
            f"{len(others)} arrays without the prefix {stripped} of the ResNet: "
            f"{', '.join(others[:5])}; leave them out with --prefix {stripped}"
        )
    return renamed


def _resnet_prefixes(names: Iterable[str]) -> list[str]:
    """Returns what stands before the first convolution of each ResNet, once each."""
    known = set(names)
    matches = [(first.fullmatch(name), block) for name in known for first, block in _FIRST_ARRAYS]
    return sorted(
        {match[1] for match, block in matches if match and match.expand(r"\1\2") + block in known}
    )


def _from_hugging_face(name: str) -> str:
    if name.startswith("classifier.1."):
        return name.replace("classifier.1.", "fc.")
    name = re.sub(r"^resnet\.(?=embedder\.|encoder\.)", "", name)
    stem = re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name)
    if stem:
        return f"{'conv1' if stem[1] == 'convolution' else 'bn1'}.{stem[2]}"
    layer = re.fullmatch(
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(shortcut|layer\.\d+)\."
        r"(convolution|normalization)\.(\w+)",
        name,
    )
    if not layer:
        return name
    stage, block, module, kind, part = layer.groups()
    prefix = f"layer{int(stage) + 1}.{block}"
    if module == "shortcut":
        return f"{prefix}.downsample.{int(kind == 'normalization')}.{part}"
    number = int(module.removeprefix("layer.")) + 1
    return f"{prefix}.{'conv' if kind == 'convolution' else 'bn'}{number}.{part}"


def infer_backbone(shapes: Shapes) -> BackboneShape:
    """Infers the architecture of a ResNet from the shapes of its arrays.

    Args:
      shapes: Torchvision's name -> shape.

    Returns:
      Depth, width and side of the first convolution.

    Raises:
      InputError: The arrays are not those of a supported ResNet.
    """
    first = shapes.get("conv1.weight", ())
    num_blocks = tuple(
        len({block[1] for name in shapes if (block := re.match(rf"layer{stage}\.(\d+)\.", name))})
        for stage in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in shapes
    depths = [
        depth
        for depth, blocks in STAGES.items()
        if blocks == num_blocks and (depth >= 50) == bottleneck
    ]
    if len(first) != 4 or first[1] != 3 or not depths:
        examples = ", ".join(sorted(shapes)[:3]) or "none"
        raise InputError(
            f"no ResNet-{'/'.join(map(str, STAGES))}: blocks in its stages {num_blocks}, arrays "
            f"{examples}, ...; wanted weights with the names of torchvision, timm or Hugging Face"
        )
    return BackboneShape(depths[0], first[0], first[2])


def describe_mismatches(
    actual: Shapes, expected: Shapes, *, allow_missing: Sequence[str] = ()
) -> str:
    """Describes every array that is missing, unexpected or of another shape, in one line.

    Args:
      actual: Name -> shape of the arrays that are there.
      expected: Name -> shape of the arrays that should be.
      allow_missing: Prefixes of names that need not be there.

    Returns:
      The description; empty where everything matches.
    """
    optional = tuple(allow_missing) or ("\0",)
    missing = [n for n in sorted(expected.keys() - actual.keys()) if not n.startswith(optional)]
    unexpected = sorted(actual.keys() - expected.keys())
    reshaped = [
        f"{name} is {actual[name]}, wanted {expected[name]}"
        for name in sorted(actual.keys() & expected.keys())
        if tuple(actual[name]) != tuple(expected[name])
    ]
    parts = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return "; ".join(
        f"{len(items)} {kind}: {', '.join(items)}" for kind, items in parts.items() if items
    )
