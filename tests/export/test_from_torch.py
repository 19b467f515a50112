"""A ResNet's weights taken in: from every kind of file, or refused with everything that is wrong in
one line.
"""

import json
import signal

import numpy as np
import pytest

from sicot_jax.cli import main as cli
from sicot_jax.common import files
from sicot_jax.weights import bundle as folders
from sicot_jax.weights.safetensors_io import read_weights

torch = pytest.importorskip("torch", reason="conversion needs the extra torch")


def state_dict(depth=18, *, stem="imagenet", classes=5, **fields):
    """Of a small ResNet with torchvision's names, batch norms as after training."""
    from sicot_jax.weights.templates.torch_model import SicotRecognizer

    torch.manual_seed(depth)
    fields = {"width": 8, "last_stride": 2, "embedding_width": 0, **fields}
    net = SicotRecognizer(
        {"depth": depth, "stem": stem, "classes": classes, **fields}, {}, [""] * classes
    )
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def taken_in(tmp_path, weights, *flags, name="weights.pth"):
    torch.save(weights, tmp_path / name)
    assert (
        cli.main(
            ["convert", "from-torch", str(tmp_path / name), f"--out={tmp_path / 'out'}", *flags]
        )
        == 0
    )
    return folders.read_converted(tmp_path / "out")


def refused(tmp_path, capsys, weights, *flags):
    torch.save(weights, tmp_path / "weights.pth")
    capsys.readouterr()
    assert (
        cli.main(
            [
                "convert",
                "from-torch",
                str(tmp_path / "weights.pth"),
                f"--out={tmp_path / 'out'}",
                *flags,
            ]
        )
        == 2
    )
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pth"}  # nothing half written
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_depth_and_names_are_found_and_the_classifier_is_left_behind(tmp_path, capsys):
    weights = state_dict(50)
    found = taken_in(tmp_path, {f"module.{name}": tensor for name, tensor in weights.items()})
    assert found.model == folders.Model(50, 8, "imagenet", 2, 0, 0)
    assert not (tmp_path / "out" / "classes.csv").exists()
    stored = read_weights(tmp_path / "out" / "model.safetensors")
    kept = {
        name
        for name in weights
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    assert stored.keys() == kept
    np.testing.assert_array_equal(
        stored["layer4.2.bn3.running_var"], weights["layer4.2.bn3.running_var"]
    )
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
    ("name", "content"),
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
    assert (
        cli.main(
            ["convert", "from-torch", str(tmp_path / "weights.pth"), f"--out={tmp_path / 'out'}"]
        )
        == 2
    )
    assert (
        "no PyTorch here to read a file of torch.save; install it: pip install 'sicot_jax[torch]'"
        in capsys.readouterr().err
    )


def test_two_names_for_one_array_are_no_weights(tmp_path, capsys):
    weights = state_dict()
    weights["encoder.stages.0.layers.0.layer.0.convolution.weight"] = torch.zeros_like(
        weights["layer1.0.conv1.weight"]
    )
    assert "two arrays for layer1.0.conv1.weight" in refused(tmp_path, capsys, weights)


def test_parameters_are_arrays_too(tmp_path):
    weights = {
        name: torch.nn.Parameter(x) if x.is_floating_point() else x
        for name, x in state_dict().items()
    }
    assert taken_in(tmp_path, weights).model.depth == 18


def test_missing_anything_is_not_asked_for(tmp_path, capsys):
    assert "would let anything be missing" in refused(
        tmp_path, capsys, state_dict(), "--may-miss", ""
    )


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"hidden_act": "gelu"}, "another ResNet than torchvision's (hidden_act=gelu)"),
        (
            {"downsample_in_bottleneck": True},
            "another ResNet than torchvision's (downsample_in_bottleneck=True)",
        ),
        ({"mean": 3}, "its config of photos is not as usual"),
        ([1], "holds no table, wanted the config of a model"),
    ],
)
def test_what_lies_beside_the_weights_is_read_or_refused(tmp_path, capsys, beside, told):
    torch.save(state_dict(), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(json.dumps(beside))
    assert (
        cli.main(
            ["convert", "from-torch", str(tmp_path / "weights.pth"), f"--out={tmp_path / 'out'}"]
        )
        == 2
    )
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_side_and_crop_travel_too(tmp_path):
    """timm's fields: a square of 32 pixels out of 40."""
    fields = {
        "input_size": [3, 32, 32],
        "crop_pct": 0.8,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "pretrained_cfg": fields})
    )
    found = taken_in(tmp_path, state_dict()).preprocessing
    assert (found.height, found.width, found.resize_height, found.resize_width) == (32, 32, 40, 40)
    assert found.mean == found.std == (0.5, 0.5, 0.5)


def test_a_class_table_of_another_length_is_refused(tmp_path, capsys):
    """And the file in a folder of ours stands for the folder: classifier, class table and
    preprocessing come along.
    """
    from sicot_jax import config as config_lib
    from sicot_jax.training.loop import train

    train(
        config_lib.load_config("tiny", ["--config.train.steps=1", "--config.loss.mixed=0"]),
        tmp_path / "run",
    )
    out, back = tmp_path / "exported", tmp_path / "back"
    assert cli.main(["convert", "to-torch", f"--workdir={tmp_path / 'run'}", f"--out={out}"]) == 0
    assert cli.main(["convert", "from-torch", str(out / "model.safetensors"), f"--out={back}"]) == 0
    assert folders.read_converted(back).model == folders.read_converted(out).model
    assert (back / "classes.csv").read_bytes() == (out / "classes.csv").read_bytes()
    lines = (out / "classes.csv").read_text().splitlines()
    (out / "classes.csv").write_text("\n".join(lines[:-3]) + "\n")
    capsys.readouterr()
    assert cli.main(["convert", "from-torch", str(out), f"--out={tmp_path / 'other'}"]) == 2
    assert "8 classes, and the model has 11" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_conversion_that_is_stopped_leaves_nothing(tmp_path):
    with pytest.raises(SystemExit), files.atomic_directory(tmp_path / "a" / "out") as new:
        (new / "half").write_text("written")
        signal.raise_signal(signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
