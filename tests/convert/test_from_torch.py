"""A ResNet's weights taken in: from every kind of file, or refused with everything that is wrong in one line."""

import json

import numpy as np
import pytest

from sicot_jax import cli
from sicot_jax.convert import folder as folders
from sicot_jax.convert.weights import read_weights

torch = pytest.importorskip("torch", reason="conversion needs the extra torch")


def state_dict(depth=18, *, stem="imagenet", classes=5, **fields):
    """Of a small ResNet with torchvision's names, batch norms as after training."""
    from sicot_jax.convert.torch_model import SicotRecognizer

    torch.manual_seed(depth)
    fields = {"width": 8, "last_stride": 2, "embedding_width": 0, **fields}
    net = SicotRecognizer({"depth": depth, "stem": stem, "classes": classes, **fields}, {}, [""] * classes)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def taken_in(tmp_path, weights, *flags, name="weights.pth"):
    torch.save(weights, tmp_path / name)
    assert cli.main(["convert", "from-torch", str(tmp_path / name), f"--out={tmp_path / 'out'}", *flags]) == 0
    return folders.read_converted(tmp_path / "out")


def refused(tmp_path, capsys, weights, *flags):
    torch.save(weights, tmp_path / "weights.pth")
    capsys.readouterr()
    assert cli.main(["convert", "from-torch", str(tmp_path / "weights.pth"), f"--out={tmp_path / 'out'}", *flags]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pth"}  # nothing half written
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_depth_and_names_are_found_and_the_classifier_is_left_behind(tmp_path, capsys):
    weights = state_dict(50)
    found = taken_in(tmp_path, {f"module.{name}": tensor for name, tensor in weights.items()})
    assert found.model == folders.Model(50, 8, "imagenet", 2, 0, 0) and not (tmp_path / "out" / "classes.csv").exists()
    stored = read_weights(tmp_path / "out" / "model.safetensors")
    kept = {name for name in weights if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}
    assert stored.keys() == kept
    np.testing.assert_array_equal(stored["layer4.2.bn3.running_var"], weights["layer4.2.bn3.running_var"])
    assert "PyTorch against JAX: embedding differs by" in capsys.readouterr().out


@pytest.mark.parametrize("stem", ["half", "small"])
def test_a_stem_that_is_not_told_is_asked_for(tmp_path, capsys, stem):
    weights = state_dict(stem=stem, classes=0)
    line = refused(tmp_path, capsys, weights)
    assert "stem='', and the first convolution is 3x3: wanted half or small; give --stem" in line
    assert taken_in(tmp_path, weights, f"--stem={stem}").model.stem == stem


def test_everything_that_does_not_fit_is_told_in_one_line(tmp_path, capsys):
    weights = state_dict()
    del weights["layer1.0.bn1.weight"], weights["layer2.0.conv1.weight"]
    weights["aux.weight"], weights["bn1.bias"] = torch.zeros(3), torch.zeros(9)
    line = refused(tmp_path, capsys, weights)
    assert (
        "2 missing: layer1.0.bn1.weight, layer2.0.conv1.weight; 1 unexpected: aux.weight; 1 of another shape: bn1"
        in line
    )


def test_arrays_that_may_be_missing_are_named_and_start_anew(tmp_path):
    weights = state_dict()
    del weights["layer1.0.bn1.weight"]
    taken_in(tmp_path, weights, "--may-miss", "layer1.0.bn1")
    stored = read_weights(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(stored["layer1.0.bn1.weight"], np.ones(8, np.float32))


def test_something_else_and_numbers_that_are_none(tmp_path, capsys):
    assert "no ResNet-18/34/50/101/152" in refused(tmp_path, capsys, {"vit.weight": torch.zeros(3)})
    broken = state_dict()
    broken["bn1.bias"][2] = torch.nan
    assert "NaN or infinity in bn1.bias" in refused(tmp_path, capsys, broken)


@pytest.mark.parametrize(
    "name, content",
    [
        ("preprocessor_config.json", {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}),
        ("config.json", {"pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}}),
    ],
)
def test_mean_and_deviation_travel_with_the_weights(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    found = taken_in(tmp_path, state_dict(classes=0)).preprocessing
    assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


def test_without_torch_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    torch.save(state_dict(), tmp_path / "weights.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert cli.main(["convert", "from-torch", str(tmp_path / "weights.pth"), f"--out={tmp_path / 'out'}"]) == 2
    assert (
        "no PyTorch here to read a file of torch.save; install it: pip install 'sicot_jax[torch]'"
        in capsys.readouterr().err
    )
