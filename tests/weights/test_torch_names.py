"""Names and shapes of a ResNet's arrays against those of torchvision, timm and Hugging Face."""

import hashlib

import numpy as np
import pytest
from flax import nnx

from sicot_jax.errors import InputError
from sicot_jax.weights import torch_names as names
from sicot_jax.weights import visual as network
from sicot_jax.weights.bundle import Model

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
        lambda: network.fresh_stream(Model(depth, 64, "imagenet", 2, 0, 0, **model))
    )
    _, *trees = nnx.split(stream, nnx.Param, nnx.BatchStat)
    return network.shapes_of(*map(nnx.to_pure_dict, trees))


def hugging_face_name(name: str) -> str:
    """What `ResNetForImageClassification` calls the array of torchvision's name (transformers 5)."""
    kinds = {"conv": "convolution", "bn": "normalization"}
    module, _, part = name.rpartition(".")
    if module in ("conv1", "bn1"):
        return f"resnet.embedder.embedder.{kinds[module[:-1]]}.{part}"
    layer, block, rest = module.split(".", 2)
    place = f"resnet.encoder.stages.{int(layer[-1]) - 1}.layers.{block}"
    if rest.startswith("downsample"):
        return f"{place}.shortcut.{'convolution' if rest.endswith('0') else 'normalization'}.{part}"
    kind, number = rest[:-1], int(rest[-1]) - 1
    return f"{place}.layer.{number}.{kinds[kind]}.{part}"


@pytest.mark.parametrize("depth", TORCHVISION)
def test_names_and_shapes_are_torchvision_s(depth):
    found = {name: list(shape) for name, shape in shapes_of(depth).items()}
    features = 512 if depth < 50 else 2048
    found |= {"fc.weight": [1000, features], "fc.bias": [1000]}
    counters = {
        name.replace("running_mean", "num_batches_tracked"): []
        for name in found
        if name.endswith("running_mean")
    }
    lines = "\n".join(sorted(f"{name} {shape}" for name, shape in (found | counters).items()))
    assert (len(found | counters), hashlib.sha256(lines.encode()).hexdigest()[:16]) == TORCHVISION[
        depth
    ]


@pytest.mark.parametrize("depth", [18, 50])
def test_other_names_for_the_same_arrays(depth):
    plain = list(shapes_of(depth))
    for others in (
        [f"module.{name}" for name in plain],
        [hugging_face_name(name) for name in plain],
        [hugging_face_name(name).removeprefix("resnet.") for name in plain],
    ):
        assert (
            list(
                names.torchvision_names(
                    [*others, "bn1.num_batches_tracked"][: len(others)]
                ).values()
            )
            == plain
        )
    assert names.torchvision_names(["classifier.1.weight"]) == {"classifier.1.weight": "fc.weight"}


@pytest.mark.parametrize("depth", TORCHVISION)
def test_depth_and_width_are_read_off_the_arrays(depth):
    assert names.backbone_of(shapes_of(depth)) == names.Backbone(depth, 64, 7)


def test_arrays_of_something_else_are_no_resnet():
    with pytest.raises(
        InputError, match=r"no ResNet-18/34/50/101/152: .*, arrays fc1.weight, ...; wanted weights"
    ):
        names.backbone_of({"fc1.weight": (3, 3)})


def test_layouts_are_each_other_s_inverse():
    for shape in [(3, 3, 4, 5), (4, 5), (7,)]:
        array = np.arange(np.prod(shape)).reshape(shape)
        np.testing.assert_array_equal(names.from_torch_layout(names.to_torch_layout(array)), array)
    assert names.to_torch_layout(np.zeros((3, 3, 4, 5))).shape == (5, 4, 3, 3)


def test_everything_that_does_not_fit_is_told_at_once():
    found, wanted = {"a": (1,), "b": (2,), "x": (1,)}, {"a": (1,), "b": (3,), "c": (1,), "d": (4,)}
    told = names.mismatches(found, wanted, may_be_missing=["d"])
    assert told == "1 missing: c; 1 unexpected: x; 1 of another shape: b is (2,), wanted (3,)"
    assert not names.mismatches(wanted, wanted)
    assert "missing: c, d" in names.mismatches(found, wanted)
