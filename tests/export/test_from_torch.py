"""Import of ResNet weights: from every kind of file, or refused with all faults in one line."""

import json
import signal

import numpy as np
import pytest

from sicot_jax.cli import main as cli
from sicot_jax.common import files
from sicot_jax.config import ConfigError, load_config
from sicot_jax.training.pretrained import check_source
from sicot_jax.weights.bundle import RecognizerSpec, read_bundle
from sicot_jax.weights.safetensors_io import read_weights

torch = pytest.importorskip("torch", reason="conversion needs the extra torch")


def state_dict(depth=18, *, stem="imagenet", classes=5, **fields):
    """Weights of a small ResNet by torchvision's names, batch norms as after training."""
    from sicot_jax.weights.templates.torch_model import SicotRecognizer

    torch.manual_seed(depth)
    fields = {"width": 8, "last_stride": 2, "embedding_width": 0, **fields}
    net = SicotRecognizer(
        {"depth": depth, "stem": stem, "num_classes": classes, **fields}, {}, [""] * classes
    )
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def imported(tmp_path, weights, *flags, name="weights.pth"):
    torch.save(weights, tmp_path / name)
    assert (
        cli.main(
            ["convert", "from-torch", str(tmp_path / name), f"--out={tmp_path / 'out'}", *flags]
        )
        == 0
    )
    return read_bundle(tmp_path / "out")


def import_error(tmp_path, capsys, weights, *flags):
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


def test_depth_and_names_are_inferred_and_the_classifier_is_left_out(tmp_path, capsys):
    weights = state_dict(50)
    bundle = imported(tmp_path, {f"module.{name}": tensor for name, tensor in weights.items()})
    assert bundle.model == RecognizerSpec(50, 8, "imagenet", 2, 0, 0)
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
def test_a_stem_that_cannot_be_inferred_must_be_given(tmp_path, capsys, stem):
    weights = state_dict(stem=stem, classes=0)
    line = import_error(tmp_path, capsys, weights)
    assert "stem='', and the first convolution is 3x3: wanted half or small; give --stem" in line
    assert imported(tmp_path, weights, f"--stem={stem}").model.stem == stem


def test_all_mismatches_are_in_one_line(tmp_path, capsys):
    weights = state_dict()
    del weights["layer1.0.bn1.weight"], weights["layer2.0.conv1.weight"]
    weights["aux.weight"], weights["bn1.bias"] = torch.zeros(3), torch.zeros(9)
    line = import_error(tmp_path, capsys, weights)
    assert (
        "2 missing: layer1.0.bn1.weight, layer2.0.conv1.weight; 1 unexpected: aux.weight; "
        "1 of another shape: bn1" in line
    )


def test_missing_arrays_that_are_allowed_get_initial_values(tmp_path):
    weights = state_dict()
    del weights["layer1.0.bn1.weight"]
    imported(tmp_path, weights, "--allow-missing", "layer1.0.bn1")
    stored = read_weights(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(stored["layer1.0.bn1.weight"], np.ones(8, np.float32))


def test_other_networks_and_nan_are_refused(tmp_path, capsys):
    assert "no ResNet-10/18/34/50/101/152" in import_error(
        tmp_path, capsys, {"vit.weight": torch.zeros(3)}
    )
    broken = state_dict()
    broken["bn1.bias"][2] = torch.nan
    assert "NaN or infinity in bn1.bias" in import_error(tmp_path, capsys, broken)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}),
        ("config.json", {"pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}}),
    ],
)
def test_mean_and_standard_deviation_are_read_from_files_next_to_the_weights(
    tmp_path, name, content
):
    (tmp_path / name).write_text(json.dumps(content))
    preprocessing = imported(tmp_path, state_dict(classes=0)).preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


def test_without_torch_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    torch.save(state_dict(), tmp_path / "weights.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert (
        cli.main(
            ["convert", "from-torch", str(tmp_path / "weights.pth"), f"--out={tmp_path / 'out'}"]
        )
        == 2
    )
    assert (
        "no PyTorch here to convert; install it: pip install 'sicot_jax[torch]'"
        in capsys.readouterr().err
    )


def test_a_folder_of_hugging_face_and_a_network_around_the_resnet(tmp_path):
    weights = {f"backbone.{name}": x for name, x in state_dict().items()}
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    torch.save(weights | {"head.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "resnet"}')
    command = ["convert", "from-torch", str(folder), f"--out={out}"]
    assert cli.main(command) == 2
    assert cli.main([*command, "--prefix=backbone"]) == 0
    assert read_bundle(out).model == RecognizerSpec(18, 8, "imagenet", 2, 0, 0)


@pytest.mark.parametrize("name", ["weights.pth", "folder/model.safetensors"])
def test_weights_of_pytorch_as_a_start_name_the_command_that_converts_them(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    (path.parent / "config.json").write_text("{}")
    given = path.parent if "/" in name else path
    with pytest.raises(ConfigError, match=rf"weights of PyTorch.*from-torch {given} --out=DIR"):
        check_source(load_config("tiny", [f"--config.model.init_from={given}"]))


def test_two_names_for_one_array_are_refused(tmp_path, capsys):
    weights = state_dict()
    weights["encoder.stages.0.layers.0.layer.0.convolution.weight"] = torch.zeros_like(
        weights["layer1.0.conv1.weight"]
    )
    assert "two arrays for layer1.0.conv1.weight" in import_error(tmp_path, capsys, weights)


def test_parameters_are_read_like_tensors(tmp_path):
    weights = {
        name: torch.nn.Parameter(x) if x.is_floating_point() else x
        for name, x in state_dict().items()
    }
    assert imported(tmp_path, weights).model.depth == 18


def test_an_empty_prefix_is_refused(tmp_path, capsys):
    assert "would let anything be missing" in import_error(
        tmp_path, capsys, state_dict(), "--allow-missing", ""
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "another ResNet than torchvision's (hidden_act=gelu)"),
        (
            {"downsample_in_bottleneck": True},
            "another ResNet than torchvision's (downsample_in_bottleneck=True)",
        ),
        ({"mean": 3}, "the photos' config has an unknown form"),
        ([1], "holds no table, wanted the config of a model"),
    ],
)
def test_configs_of_other_networks_are_refused(tmp_path, capsys, config, message):
    torch.save(state_dict(), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (
        cli.main(
            ["convert", "from-torch", str(tmp_path / "weights.pth"), f"--out={tmp_path / 'out'}"]
        )
        == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_side_and_crop_share_are_read_too(tmp_path):
    """Timm's fields: a square of 32 pixels, cropped out of 40."""
    fields = {
        "input_size": [3, 32, 32],
        "crop_pct": 0.8,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "pretrained_cfg": fields})
    )
    read = imported(tmp_path, state_dict()).preprocessing
    assert (read.height, read.width, read.resize_height, read.resize_width) == (32, 32, 40, 40)
    assert read.mean == read.std == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_a_class_table_of_another_length_is_import_error(tmp_path, capsys):
    """Of a bundle, the weights file stands for the folder: classifier, class table and
    preprocessing are imported too.
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
    assert read_bundle(back).model == read_bundle(out).model
    assert (back / "classes.csv").read_bytes() == (out / "classes.csv").read_bytes()
    lines = (out / "classes.csv").read_text().splitlines()
    (out / "classes.csv").write_text("\n".join(lines[:-3]) + "\n")
    capsys.readouterr()
    assert cli.main(["convert", "from-torch", str(out), f"--out={tmp_path / 'other'}"]) == 2
    assert "8 classes, and the model has 11" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    def convert():
        with files.atomic_directory(tmp_path / "a" / "out") as new:
            (new / "half").write_text("written")
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        convert()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
