"""Reads how photos are prepared from the configuration files of Hugging Face and timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sicot_jax.common.files import read_json
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError

_CROP_SHARE = 0.875  # of a resized photo's side, the usual share for ImageNet


def read_foreign_preprocessing(folder: Path) -> Preprocessing:
    """Reads mean, standard deviation, side and crop share from the files next to some weights.

    Resizing is bilinear, whatever the files say.

    Args:
      folder: Folder with the weights, and maybe `config.json` and `preprocessor_config.json`.

    Returns:
      The preprocessing; what the files do not say is as for ImageNet.

    Raises:
      InputError: The files describe another network than torchvision's with the same arrays, or
        cannot be read.
    """
    stored: dict[str, Any] = {}
    try:
        for name in ("config.json", "preprocessor_config.json"):
            if (path := folder / name).exists():
                content = read_json(path, "the config of a model or of its photos, as JSON")
                stored |= content.get("pretrained_cfg") or content
        _check_network(stored)
        return Preprocessing(**_preprocessing_fields(stored))
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{folder}: the photos' config has an unknown form ({error}); "
            "give the weights without it"
        ) from error


def _preprocessing_fields(stored: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field, names in (("mean", ("image_mean", "mean")), ("std", ("image_std", "std"))):
        if name := next((name for name in names if stored.get(name) is not None), ""):
            fields[field] = tuple(float(x) for x in stored[name])
    if stored.get("do_normalize") is False:
        fields |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if side := _input_side(stored):
        resized = round(side / float(stored.get("crop_pct") or _CROP_SHARE))
        fields |= dict.fromkeys(("height", "width"), side)
        fields |= dict.fromkeys(("resize_height", "resize_width"), resized)
    return fields


def _input_side(stored: dict[str, Any]) -> int:
    """Returns the side of a square input in pixels, 0 where the files do not say it."""
    size = stored.get("crop_size") or stored.get("size") or stored.get("input_size") or 0
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height") or 0
    return int(size[-1] if isinstance(size, list) else size)


def _check_network(stored: dict[str, Any]) -> None:
    """Refuses options that change the network but not its arrays."""
    options = {
        name: stored[name]
        for name in ("downsample_in_bottleneck", "downsample_in_first_stage")
        if stored.get(name)
    }
    if stored.get("hidden_act", "relu") != "relu":
        options["hidden_act"] = stored["hidden_act"]
    if options:
        listed = ", ".join(f"{name}={value}" for name, value in options.items())
        raise InputError(
            f"another ResNet than torchvision's ({listed}); wanted one with none of these"
        )
