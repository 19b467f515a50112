"""A product recogniser in plain PyTorch: photo in, SKUs and probabilities out.

    recognizer = SicotRecognizer.from_pretrained("exported")
    for product in recognizer.recognize("photo.jpg"):
        print(product["sku"], product["probability"])

Needs torch, numpy, Pillow and safetensors, and pillow-heif for HEIC photos. `sicot convert
to-torch` writes this file next to the weights; edit it as you like.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from safetensors.torch import load_file
from torch import nn

try:
    from pillow_heif import register_heif_opener

    register_heif_opener()
    HEIF_FORMATS: tuple[str, ...] = ("HEIF",)
except ImportError:
    HEIF_FORMATS = ()

# Residual blocks of each stage, by depth.
BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# Side and stride of the first convolution.
STEMS = {"imagenet": (7, 2), "half": (3, 2), "small": (3, 1)}
# Foreground mask of the two-pass forward: slope of its edge, and how far the edge lies outside of
# the box, as a fraction of the photo.
MASK_SHARPNESS, MASK_MARGIN = 60.0, 2 / 60
# The box is refined so many times, within a window so much larger than itself, with soft edges.
REFINEMENTS, WINDOW_SCALE, WINDOW_SHARPNESS = 4, 1.15, 30.0

# Photos are decoded as `sicot` decodes them, to the same pixels.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *HEIF_FORMATS)
MAX_PIXELS = 100_000_000
EXIF_ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Colour spaces of ICC profiles that an image of a mode can have; others do not belong to it.
PROFILE_SPACE = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
MAX_PROFILE_BYTES, SRGB_TOLERANCE = 4 << 20, 2


@contextlib.contextmanager
def photo_errors() -> Iterator[None]:
    """Turns whatever a damaged photo raises into a ValueError.

    Yields:
      Nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            raise ValueError(f"photo: {error or type(error).__name__}") from error


def open_photo(file: str | Path) -> Image.Image:
    """Reads a photo file.

    Args:
      file: Its path.

    Returns:
      The photo as stored, in one of PHOTO_FORMATS.

    Raises:
      ValueError: Another format, more than MAX_PIXELS, truncated or damaged.
    """
    data = Path(file).read_bytes()
    with photo_errors():
        photo = Image.open(io.BytesIO(data), formats=PHOTO_FORMATS)
        if photo.width * photo.height > MAX_PIXELS:
            raise ValueError(f"{photo.width} x {photo.height} pixels, at most {MAX_PIXELS}")
        photo.load()
        return photo


def upright_rgb(photo: Image.Image) -> Image.Image:
    """Converts a photo of any mode to sRGB and turns it upright.

    Args:
      photo: The photo, with its colour profile and EXIF block.

    Returns:
      The photo, of mode RGB; what is transparent is white.

    Raises:
      ValueError: Floating-point pixels, or a mode that Pillow cannot convert.
    """
    with photo_errors():
        try:
            orientation = int(photo.getexif().get(EXIF_ORIENTATION, 1))
        except Exception:
            orientation = 1  # an unreadable EXIF block says nothing about the pixels
        rgb = to_rgb(photo)
        return rgb.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else rgb


def to_rgb(photo: Image.Image) -> Image.Image:
    """Converts a photo of any mode to sRGB.

    Args:
      photo: The photo, with its colour profile.

    Returns:
      The photo, of mode RGB, not turned.

    Raises:
      ValueError: Floating-point pixels.
    """
    profile = photo.info.get("icc_profile")
    if photo.mode.startswith("I;16") or photo.mode == "I":
        # Pillow's conversion clips 16-bit grey to white.
        grey = np.clip(np.asarray(photo, dtype=np.int64), 0, 65535)
        scaled = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
        return convert_colours(scaled, profile)
    if photo.mode == "F":
        raise ValueError("floating-point pixels, wanted 8 or 16 bit")
    if photo.has_transparency_data:
        rgba = photo.convert("RGBA")
        if profile:
            opaque = rgba.convert("L" if photo.mode == "LA" else "RGB")
            alpha, rgba = rgba.getchannel("A"), convert_colours(opaque, profile)
            rgba.putalpha(alpha)
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if photo.mode not in ("L", "CMYK"):
        photo = photo.convert("RGB")
    return convert_colours(photo, profile)


def convert_colours(photo: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts a photo to sRGB by its colour profile.

    Args:
      photo: Photo of mode RGB, L or CMYK.
      profile: ICC profile; None is sRGB.

    Returns:
      The photo, of mode RGB.
    """
    transform = to_srgb(profile, photo.mode) if profile else None
    return transform.apply(photo) if transform else photo.convert("RGB")


@functools.lru_cache(maxsize=16)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform of a colour profile to sRGB.

    Args:
      profile: ICC profile.
      mode: RGB, L or CMYK.

    Returns:
      The transform; None for sRGB in other words, another kind of image or a damaged profile.
    """
    if len(profile) > MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != PROFILE_SPACE[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    ramp = np.linspace(0, 255, 9).round().astype(np.uint8)
    if mode == "RGB":
        levels = np.stack(np.meshgrid(ramp, ramp, ramp, indexing="ij"), -1).reshape(27, 27, 3)
    else:
        levels = np.tile(ramp, (9, 1))
    sample = Image.fromarray(levels)
    converted = np.asarray(transform.apply(sample), np.int16)
    change = np.abs(converted - np.asarray(sample.convert("RGB"), np.int16)).max()
    return None if change <= SRGB_TOLERANCE else transform


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Builds a convolution without bias that keeps the size of its input at stride 1.

    Args:
      inputs: Input channels.
      outputs: Output channels.
      size: Side of the kernel, odd.
      stride: Stride.

    Returns:
      The layer.
    """
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class ResNetBlock(nn.Module):
    """Residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        """Builds a block.

        Args:
          inputs: Input channels.
          width: Channels of the first convolution.
          stride: Stride of the block.
          bottleneck: Whether it is a bottleneck, with 4 x width output channels.
        """
        super().__init__()
        outputs = width * 4 if bottleneck else width
        if bottleneck:
            self.conv1, self.bn1 = convolution(inputs, width, 1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = convolution(width, outputs, 1), nn.BatchNorm2d(outputs)
        else:
            self.conv1, self.bn1 = convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = convolution(width, width, 3), nn.BatchNorm2d(width)
        self.bottleneck = bottleneck
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the output of the block.

        Args:
          x: Feature maps [B, inputs, H, W].

        Returns:
          Feature maps [B, outputs, H / stride, W / stride].
        """
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(torch.relu(x)))
        return torch.relu(x + shortcut)


def soft_mask(box: torch.Tensor, height: int, width: int, sharpness: float) -> torch.Tensor:
    """Returns masks that are near 1 inside of boxes and near 0 outside.

    Args:
      box: Left, top, right, bottom as fractions, [B, 4].
      height: Height of the masks, pixels.
      width: Width of the masks, pixels.
      sharpness: Slope of the edges.

    Returns:
      Masks [B, height, width].
    """

    def along(low: torch.Tensor, high: torch.Tensor, count: int) -> torch.Tensor:
        centre = (torch.arange(count, device=box.device) + 0.5) / count
        above_low = torch.sigmoid(sharpness * (centre - low[:, None]))
        return above_low - torch.sigmoid(sharpness * (centre - high[:, None]))

    left, top, right, bottom = box.unbind(1)
    return along(top, bottom, height)[:, :, None] * along(left, right, width)[:, None, :]


class LocalizationBranch(nn.Module):
    """Predicts the product's box from the mean and spread of an attention map."""

    def __init__(self, widths: list[int], hidden: int = 64):
        """Builds the branch.

        Args:
          widths: Channels of the feature maps of the four stages.
          hidden: Channels of their sum.
        """
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            convolution(width, hidden, 1) for width in widths
        )
        self.bn, self.score = nn.BatchNorm2d(hidden), nn.Linear(hidden, 1)
        self.log_scale = nn.Parameter(torch.zeros(2))

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Predicts boxes.

        Args:
          maps: Feature maps of the four stages, [B, channels, height, width] each.

        Returns:
          Left, top, right, bottom as fractions of the photo, not clipped, [B, 4].
        """
        size = maps[0].shape[2:]
        x = self.conv1(maps[0])
        for conv, coarser in zip((self.conv2, self.conv3, self.conv4), maps[1:], strict=True):
            x = x + nn.functional.interpolate(
                conv(coarser), size=size, mode="bilinear", align_corners=False
            )
        score = self.score(torch.relu(self.bn(x)).permute(0, 2, 3, 1))[..., 0]
        # Not log(sigmoid): in an ONNX graph that is the logarithm of 0.
        level = -2 * nn.functional.softplus(-10 * score)
        attention = torch.exp(level - level.amax((1, 2), keepdim=True))
        box = self.box_from_moments(attention)
        for _ in range(REFINEMENTS):
            centre = (box[:, :2] + box[:, 2:]) / 2
            half = (box[:, 2:] - box[:, :2]) / 2 * WINDOW_SCALE
            window = torch.cat([centre - half, centre + half], 1)
            mask = soft_mask(window, size[0], size[1], WINDOW_SHARPNESS)
            box = self.box_from_moments(attention * mask)
        return box

    def box_from_moments(self, attention: torch.Tensor) -> torch.Tensor:
        """Computes boxes from the mean and variance of attention maps.

        Args:
          attention: Non-negative maps [B, H, W].

        Returns:
          Left, top, right, bottom as fractions, [B, 4].
        """
        total = attention.sum((1, 2))[:, None] + 1e-12
        low, high = [], []
        for axis, count in ((1, attention.shape[2]), (2, attention.shape[1])):
            share = attention.sum(axis) / total
            centre = (torch.arange(count, device=attention.device) + 0.5) / count
            mean = share @ centre
            variance = (share @ (centre * centre) - mean * mean).clamp(min=0)
            variance = variance + 1 / (12 * count * count)
            half = torch.sqrt(3 * variance) * torch.exp(self.log_scale[axis - 1])
            low.append(mean - half)
            high.append(mean + half)
        return torch.stack([*low, *high], 1)


class SicotRecognizer(nn.Module):
    """ResNet, pooling, optional projection, classifier; parameters have torchvision's names."""

    def __init__(
        self,
        model: dict[str, Any],
        preprocessing: dict[str, Any],
        skus: list[str],
        discontinued: list[int] | None = None,
    ):
        """Builds the network with initial weights.

        Args:
          model: "depth", "width", "stem", "last_stride", "embedding_width" (0: no projection),
            "num_classes" (0: no classifier), and "localization": "none", "image" (two-pass
            forward: the second pass sees the foreground alone) or "features" (the foreground
            of the last feature map is pooled).
          preprocessing: How a photo becomes input, see `preprocess`.
          skus: Product of each class.
          discontinued: Classes of discontinued products, which `recognize` leaves out.
        """
        super().__init__()
        self.preprocessing, self.skus = preprocessing, skus
        self.discontinued = discontinued or []
        depth, width = model["depth"], model["width"]
        bottleneck = depth >= 50
        size, stride = STEMS[model["stem"]]
        self.conv1, self.bn1 = convolution(3, width, size, stride), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if model["stem"] == "imagenet" else nn.Identity()
        channels, stages = width, []
        for stage, num_blocks in enumerate(BLOCKS[depth]):
            first_stride = (1, 2, 2, model["last_stride"])[stage]
            blocks = []
            for number in range(num_blocks):
                stride = first_stride if number == 0 else 1
                blocks.append(ResNetBlock(channels, width * 2**stage, stride, bottleneck))
                channels = width * 2**stage * (4 if bottleneck else 1)
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.two_pass = model.get("localization", "none") == "image"
        self.localization = None
        if model.get("localization", "none") != "none":
            self.localization = LocalizationBranch([channels // 2**n for n in (3, 2, 1, 0)])
        self.projection = self.projection_norm = None
        if model["embedding_width"]:
            self.projection = nn.Linear(channels, model["embedding_width"], bias=False)
            self.projection_norm = nn.BatchNorm1d(model["embedding_width"])
            channels = model["embedding_width"]
        num_classes = model["num_classes"]
        self.fc = nn.Linear(channels, num_classes) if num_classes else None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SicotRecognizer:
        """Loads the recogniser of a folder of `sicot convert to-torch`.

        Args:
          folder: The folder.

        Returns:
          The recogniser, in evaluation mode.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        skus, discontinued = [], []
        if config["model"]["num_classes"]:
            with (folder / "classes.csv").open(encoding="utf-8-sig", newline="") as file:
                products = list(csv.DictReader(file))
            skus = [row["sku"] for row in products]
            discontinued = [c for c, row in enumerate(products) if row["discontinued"] == "1"]
        recognizer = cls(config["model"], config["preprocessing"], skus, discontinued)
        weights = load_file(folder / "model.safetensors")
        counters = {
            name: tensor
            for name, tensor in recognizer.state_dict().items()
            if name.endswith(".num_batches_tracked")
        }
        recognizer.load_state_dict(weights | counters)
        return recognizer.eval()

    def preprocess(self, photo: str | Path | Image.Image | np.ndarray) -> torch.Tensor:
        """Resizes, crops and normalises a photo as in the evaluation of the training run.

        Args:
          photo: A file, a PIL image, or uint8 [H, W, 3].

        Returns:
          Float32 [3, height, width].

        Raises:
          ValueError: A damaged photo, or one of another format.
        """
        settings = self.preprocessing
        if isinstance(photo, np.ndarray):
            photo = Image.fromarray(photo)
        elif not isinstance(photo, Image.Image):
            photo = open_photo(photo)
        photo = upright_rgb(photo)
        size = settings["resize_width"], settings["resize_height"]
        bilinear = Image.Resampling.BILINEAR
        if photo.size != size:
            if settings["fit"] == "crop":
                photo = ImageOps.fit(photo, size, bilinear)
            elif settings["fit"] == "pad":
                photo = ImageOps.pad(photo, size, bilinear, color=(255, 255, 255))
            else:
                photo = photo.resize(size, bilinear)
        width, height = settings["width"], settings["height"]
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        photo = photo.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(photo, np.float32)) / 255
        mean, std = torch.tensor(settings["mean"]), torch.tensor(settings["std"])
        return ((pixels - mean) / std).permute(2, 0, 1)

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Computes the last feature map of each stage.

        Args:
          images: Preprocessed photos [B, 3, height, width].

        Returns:
          Four maps [B, channels, height, width].
        """
        x, maps = self.maxpool(torch.relu(self.bn1(self.conv1(images)))), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Computes embeddings.

        Args:
          images: Preprocessed photos [B, 3, height, width].

        Returns:
          Embeddings [B, D].
        """
        return self.embed_and_localize(images)[0]

    def embed_and_localize(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes embeddings and boxes.

        Args:
          images: Preprocessed photos [B, 3, height, width].

        Returns:
          Embeddings [B, D], and boxes [B, 4] (left, top, right, bottom as fractions of the
          photo), or None without a localisation branch.
        """
        maps = self.feature_maps(images)
        if self.localization is None:
            return self._project(maps[-1].mean((2, 3))), None
        box = self.localization(maps)
        if self.two_pass:
            outwards = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=box.device)
            height, width = images.shape[2:]
            foreground = soft_mask(box + MASK_MARGIN * outwards, height, width, MASK_SHARPNESS)
            pooled = self.feature_maps(images * foreground[:, None])[-1].mean((2, 3))
        else:
            height, width = maps[-1].shape[2:]
            foreground = soft_mask(box, height, width, 4.0 * max(height, width))
            total = foreground.sum((1, 2))[:, None] + 1e-3
            pooled = (maps[-1] * foreground[:, None]).sum((2, 3)) / total
        return self._project(pooled), box.clamp(0, 1)

    def _project(self, pooled: torch.Tensor) -> torch.Tensor:
        if self.projection is None or self.projection_norm is None:
            return pooled
        return torch.relu(self.projection_norm(self.projection(pooled)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Computes the logits of the classes.

        Args:
          images: Preprocessed photos [B, 3, height, width].

        Returns:
          Logits [B, C].
        """
        assert self.fc is not None, "weights without a classifier: use embed()"
        return self.fc(self.embed(images))

    @torch.inference_mode()
    def recognize(
        self, photo: str | Path | Image.Image | np.ndarray, k: int = 5
    ) -> list[dict[str, Any]]:
        """Returns the most probable products of one photo.

        Args:
          photo: A file, a PIL image, or uint8 [H, W, 3].
          k: Number of products.

        Returns:
          "class", "sku" and "probability" of each, most probable first.
        """
        logits = self(self.preprocess(photo)[None].to(self.conv1.weight.device))[0]
        logits[self.discontinued] = -torch.inf
        k = min(k, len(self.skus) - len(self.discontinued))
        probability, classes = logits.softmax(-1).topk(k)
        return [
            {"class": c, "sku": self.skus[c], "probability": p}
            for c, p in zip(classes.tolist(), probability.tolist(), strict=True)
        ]
