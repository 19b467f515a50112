"""Names and shapes of a ResNet's arrays against those of torchvision, timm and Hugging Face."""

import hashlib

import numpy as np
import pytest
from flax import nnx

from sicot_jax.errors import InputError
from sicot_jax.weights.bundle import RecognizerSpec
from sicot_jax.weights.torch_names import (
    BackboneShape,
    describe_mismatches,
    from_torch_layout,
    infer_backbone,
    to_torch_layout,
    torchvision_names,
)
from sicot_jax.weights.visual import init_visual_stream, visual_shapes

# Number of entries and sha256 over the sorted "name [shape]" lines of state_dict() of torchvision
# 0.29.2's resnet18() to resnet152(); timm 1.0.31's models of these names have the same.
TORCHVISION = {
    18: (122, "867b8d8ae95f5a28"),
    34: (218, "d6dbfa48843359d6"),
    50: (320, "2d5b8870b35e1530"),
    101: (626, "83dfe6275c4f12d9"),
    152: (932, "f11957010a75631a"),
}


def shapes_of(depth, **model):
    stream = nnx.eval_shape(
        lambda: init_visual_stream(RecognizerSpec(depth, 64, "imagenet", 2, 0, 0, **model))
    )
    _, *trees = nnx.split(stream, nnx.Param, nnx.BatchStat)
    return visual_shapes(*map(nnx.to_pure_dict, trees))


def hugging_face_name(name: str) -> str:
    """Name in `ResNetForImageClassification` (transformers 5) of an array of torchvision's."""
    kinds = {"conv": "convolution", "bn": "normalization"}
    module, _, part = name.rpartition(".")
    if module in ("conv1", "bn1"):
        return f"resnet.embedder.embedder.{kinds[module[:-1]]}.{part}"
    layer, block, rest = module.split(".", 2)
    prefix = f"resnet.encoder.stages.{int(layer[-1]) - 1}.layers.{block}"
    if rest.startswith("downsample"):
        return (
            f"{prefix}.shortcut.{'convolution' if rest.endswith('0') else 'normalization'}.{part}"
        )
    kind, number = rest[:-1], int(rest[-1]) - 1
    return f"{prefix}.layer.{number}.{kinds[kind]}.{part}"


@pytest.mark.parametrize("depth", TORCHVISION)
def test_names_and_shapes_equal_torchvision_s(depth):
    shapes = {name: list(shape) for name, shape in shapes_of(depth).items()}
    features = 512 if depth < 50 else 2048
    shapes |= {"fc.weight": [1000, features], "fc.bias": [1000]}
    counters = {
        name.replace("running_mean", "num_batches_tracked"): []
        for name in shapes
        if name.endswith("running_mean")
    }
    listing = "\n".join(sorted(f"{name} {shape}" for name, shape in (shapes | counters).items()))
    assert (
        len(shapes | counters),
        hashlib.sha256(listing.encode()).hexdigest()[:16],
    ) == TORCHVISION[depth]


@pytest.mark.parametrize("depth", [18, 50])
def test_names_of_hugging_face_and_of_distributed_training(depth):
    plain = list(shapes_of(depth))
    for others in (
        [f"module.{name}" for name in plain],
        [hugging_face_name(name) for name in plain],
        [hugging_face_name(name).removeprefix("resnet.") for name in plain],
    ):
        assert (
            list(torchvision_names([*others, "bn1.num_batches_tracked"][: len(others)]).values())
            == plain
        )
    assert torchvision_names(["classifier.1.weight"]) == {"classifier.1.weight": "fc.weight"}


PLAIN = ["conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "fc.weight"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "backbone.", "model.", "module.net.", "resnet."])
def test_any_prefix_is_removed(prefix):
    for plain in (PLAIN, [hugging_face_name(name) for name in PLAIN[:3]]):
        assert (
            list(torchvision_names([prefix + name for name in plain]).values())
            == (PLAIN[: len(plain)])
        )


def test_several_networks_or_other_arrays_need_a_prefix():
    names = [f"{prefix}.{name}" for prefix in ("model", "ema") for name in PLAIN]
    with pytest.raises(InputError, match=r"several ResNets.*'ema.', 'model.'; say which with --p"):
        torchvision_names(names)
    assert torchvision_names(names, "ema") == {f"ema.{name}": name for name in PLAIN}
    assert torchvision_names(names, "ema.") == torchvision_names(names, "ema")
    with pytest.raises(InputError, match=r"no array with the prefix other.; wanted ema. or model."):
        torchvision_names(names, "other")
    with_head = [*(f"backbone.{name}" for name in PLAIN), "head.weight"]
    with pytest.raises(
        InputError, match=r"1 arrays without the prefix backbone.*: head.weight; leave them out"
    ):
        torchvision_names(with_head)
    assert list(torchvision_names(with_head, "backbone").values()) == PLAIN


@pytest.mark.parametrize("depth", TORCHVISION)
def test_depth_and_width_are_inferred_from_shapes(depth):
    assert infer_backbone(shapes_of(depth)) == BackboneShape(depth, 64, 7)


def test_other_arrays_are_not_a_resnet():
    with pytest.raises(
        InputError,
        match=r"no ResNet-10/18/34/50/101/152: .*, arrays fc1.weight, ...; wanted weights",
    ):
        infer_backbone({"fc1.weight": (3, 3)})


def test_layouts_are_inverse():
    for shape in [(3, 3, 4, 5), (4, 5), (7,)]:
        array = np.arange(np.prod(shape)).reshape(shape)
        np.testing.assert_array_equal(from_torch_layout(to_torch_layout(array)), array)
    assert to_torch_layout(np.zeros((3, 3, 4, 5))).shape == (5, 4, 3, 3)


def test_all_mismatches_are_listed():
    actual, expected = (
        {"a": (1,), "b": (2,), "x": (1,)},
        {"a": (1,), "b": (3,), "c": (1,), "d": (4,)},
    )
    listed = describe_mismatches(actual, expected, allow_missing=["d"])
    assert listed == "1 missing: c; 1 unexpected: x; 1 of another shape: b is (2,), wanted (3,)"
    assert not describe_mismatches(expected, expected)
    assert "missing: c, d" in describe_mismatches(actual, expected)
