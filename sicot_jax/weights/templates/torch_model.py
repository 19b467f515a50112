"""A product recogniser in plain PyTorch: photo in, SKUs and probabilities out. Needs torch, numpy,
Pillow and safetensors.

    recognizer = SicotRecognizer.from_pretrained("exported")
    for product in recognizer.recognize("photo.jpg"):
        print(product["sku"], product["probability"])

Written beside the weights by `sicot convert to-torch`; change it as you like.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import nn

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STEMS = {
    "imagenet": (7, 2),
    "half": (3, 2),
    "small": (3, 1),
}  # size and stride of the first convolution


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """Basic block (two 3x3) or bottleneck (1x1, 3x3, 1x1), plus the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
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

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(torch.relu(x)))
        return torch.relu(x + shortcut)


SHARPNESS, MARGIN = (
    60.0,
    2 / 60,
)  # of the mask of a second look; how far its edge lies outside of the box
# The box is found again, so often, within so many times of it, by so sharp a mask.
ROUNDS, WIDER, WINDOW = 4, 1.15, 30.0


def soft_mask(box: torch.Tensor, height: int, width: int, sharpness: float) -> torch.Tensor:
    """Boxes [B, 4] (left, top, right, bottom, as fractions) -> [B, height, width], near 1 inside
    and near 0 outside.
    """

    def along(low, high, count):
        at = (torch.arange(count, device=box.device) + 0.5) / count
        return torch.sigmoid(sharpness * (at - low[:, None])) - torch.sigmoid(
            sharpness * (at - high[:, None])
        )

    left, top, right, bottom = box.unbind(1)
    return along(top, bottom, height)[:, :, None] * along(left, right, width)[:, None, :]


class BoxBranch(nn.Module):
    """Where the product is: maps of the four stages -> boxes [B, 4], by the mean and spread of an
    attention map.
    """

    def __init__(self, widths: list[int], hidden: int = 64):
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            convolution(width, hidden, 1) for width in widths
        )
        self.bn, self.score = nn.BatchNorm2d(hidden), nn.Linear(hidden, 1)
        self.log_scale = nn.Parameter(torch.zeros(2))

    def forward(self, maps):
        size = maps[0].shape[2:]
        x = self.conv1(maps[0])
        for conv, coarser in zip((self.conv2, self.conv3, self.conv4), maps[1:], strict=True):
            x = x + nn.functional.interpolate(
                conv(coarser), size=size, mode="bilinear", align_corners=False
            )
        score = self.score(torch.relu(self.bn(x)).permute(0, 2, 3, 1))[..., 0]
        level = -2 * nn.functional.softplus(
            -10 * score
        )  # of log sigmoid an ONNX graph makes the logarithm of 0
        attention = torch.exp(level - level.amax((1, 2), keepdim=True))
        box = self.moments(attention)
        for _ in range(ROUNDS):
            middle, half = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]) / 2 * WIDER
            window = torch.cat([middle - half, middle + half], 1)
            box = self.moments(attention * soft_mask(window, size[0], size[1], WINDOW))
        return box

    def moments(self, attention):
        total = attention.sum((1, 2))[:, None] + 1e-12
        low, high = [], []
        for axis, count in ((1, attention.shape[2]), (2, attention.shape[1])):
            share = attention.sum(axis) / total
            at = (torch.arange(count, device=attention.device) + 0.5) / count
            mean = share @ at
            variance = (share @ (at * at) - mean * mean).clamp(min=0) + 1 / (12 * count * count)
            half = torch.sqrt(3 * variance) * torch.exp(self.log_scale[axis - 1])
            low.append(mean - half)
            high.append(mean + half)
        return torch.stack([*low, *high], 1)


class SicotRecognizer(nn.Module):
    """ResNet, pooling, a projection where the model has one, and the classifier; names of
    parameters are torchvision's.

    model: depth, width, stem, last_stride, embedding_width (0: no projection), classes (0: no
      classifier) and box ("none", or what is hidden outside of the product's box: "image", looked
      at a second time, or "features").
    preprocessing: how a photo becomes input, see `preprocess`.
    skus: the product of each class.
    discontinued: classes of products that are gone; `recognize` leaves them out.
    """

    def __init__(
        self, model: dict, preprocessing: dict, skus: list[str], discontinued: list[int] | None = None
    ):
        super().__init__()
        self.preprocessing, self.skus, self.discontinued = preprocessing, skus, discontinued or []
        depth, width = model["depth"], model["width"]
        bottleneck = depth >= 50
        size, stride = STEMS[model["stem"]]
        self.conv1, self.bn1 = convolution(3, width, size, stride), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if model["stem"] == "imagenet" else nn.Identity()
        channels, stages = width, []
        for stage, blocks in enumerate(BLOCKS[depth]):
            first_stride = (1, 2, 2, model["last_stride"])[stage]
            row = []
            for block in range(blocks):
                row.append(
                    Block(channels, width * 2**stage, first_stride if block == 0 else 1, bottleneck)
                )
                channels = width * 2**stage * (4 if bottleneck else 1)
            stages.append(nn.Sequential(*row))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.hides = model.get("box", "none")
        self.box = (
            None
            if self.hides == "none"
            else BoxBranch([channels // 2**later for later in (3, 2, 1, 0)])
        )
        self.projection = self.projection_norm = None
        if model["embedding_width"]:
            self.projection = nn.Linear(channels, model["embedding_width"], bias=False)
            self.projection_norm = nn.BatchNorm1d(model["embedding_width"])
            channels = model["embedding_width"]
        self.fc = nn.Linear(channels, model["classes"]) if model["classes"] else None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SicotRecognizer:
        """The recogniser in a folder of `sicot convert to-torch`, ready to recognise photos."""
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        skus, discontinued = [], []
        if config["model"]["classes"]:
            with (folder / "classes.csv").open(encoding="utf-8", newline="") as file:
                products = list(csv.DictReader(file))
            skus = [row["sku"] for row in products]
            discontinued = [c for c, row in enumerate(products) if row["discontinued"] == "1"]
        recognizer = cls(config["model"], config["preprocessing"], skus, discontinued)
        weights = load_file(folder / "model.safetensors")
        counters = {
            name: x
            for name, x in recognizer.state_dict().items()
            if name.endswith(".num_batches_tracked")
        }
        recognizer.load_state_dict(weights | counters)
        return recognizer.eval()

    def preprocess(self, photo) -> torch.Tensor:
        """A file, a PIL image or uint8 [H, W, 3] -> float32 [3, height, width], as in training's
        evaluation.
        """
        p = self.preprocessing
        if isinstance(photo, np.ndarray):
            photo = Image.fromarray(photo)
        elif not isinstance(photo, Image.Image):
            photo = Image.open(photo)
        photo = ImageOps.exif_transpose(photo)
        if photo.has_transparency_data:
            white = Image.new("RGBA", photo.size, (255, 255, 255, 255))
            photo = Image.alpha_composite(white, photo.convert("RGBA"))
        photo = photo.convert("RGB")
        size, bilinear = (p["resize_width"], p["resize_height"]), Image.Resampling.BILINEAR
        if photo.size != size:
            if p["fit"] == "crop":
                photo = ImageOps.fit(photo, size, bilinear)
            elif p["fit"] == "pad":
                photo = ImageOps.pad(photo, size, bilinear, color=(255, 255, 255))
            else:
                photo = photo.resize(size, bilinear)
        left, top = (size[0] - p["width"]) // 2, (size[1] - p["height"]) // 2
        photo = photo.crop((left, top, left + p["width"], top + p["height"]))
        pixels = torch.from_numpy(np.array(photo, np.float32)) / 255
        return ((pixels - torch.tensor(p["mean"])) / torch.tensor(p["std"])).permute(2, 0, 1)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The last map of each stage."""
        x, maps = self.maxpool(torch.relu(self.bn1(self.conv1(images)))), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed photos [B, 3, height, width] -> embeddings [B, D]."""
        return self.look(images)[0]

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> embeddings [B, D] and boxes [B, 4] (left, top, right, bottom, as fractions of the
        photo), None of a model without a box branch.
        """
        maps, box = self.maps(images), None
        if self.box is None:
            x = maps[-1].mean((2, 3))
        else:
            box = self.box(maps)
            if self.hides == "image":
                grown = box + MARGIN * torch.tensor([-1.0, -1.0, 1.0, 1.0], device=box.device)
                seen = soft_mask(grown, images.shape[2], images.shape[3], SHARPNESS)
                x = self.maps(images * seen[:, None])[-1].mean((2, 3))
            else:
                height, width = maps[-1].shape[2:]
                seen = soft_mask(box, height, width, 4.0 * max(height, width))
                x = (maps[-1] * seen[:, None]).sum((2, 3)) / (seen.sum((1, 2))[:, None] + 1e-3)
        found = None if box is None else box.clamp(0, 1)
        if self.projection is None or self.projection_norm is None:
            return x, found
        return torch.relu(self.projection_norm(self.projection(x))), found

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed photos [B, 3, height, width] -> logits [B, classes]."""
        assert self.fc is not None, "weights without a classifier: embed() alone"
        return self.fc(self.embed(images))

    @torch.inference_mode()
    def recognize(self, photo, k: int = 5) -> list[dict]:
        """The k most probable products of one photo, best first: their class, SKU and probability."""
        logits = self(self.preprocess(photo)[None].to(self.conv1.weight.device))[0]
        logits[self.discontinued] = -torch.inf
        probability, classes = logits.softmax(-1).topk(min(k, len(self.skus) - len(self.discontinued)))
        return [
            {"class": c, "sku": self.skus[c], "probability": p}
            for c, p in zip(classes.tolist(), probability.tolist(), strict=True)
        ]
