"""ResNet-18/34/50/101/152, v1.5 (the stride sits in the 3x3), He et al. 2015, with torchvision's
padding and names.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sicot_jax.errors import InputError
from sicot_jax.models.layers import BatchNorm, Conv, max_pool_3x3

STAGES = {
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


class Block(nnx.Module):
    """Basic block (two 3x3) or bottleneck (1x1, 3x3, 1x1 with 4 times the width), plus the
    shortcut.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        stride: int,
        bottleneck: bool,
        dtype,
        rng: np.random.Generator,
    ):
        outputs = width * 4 if bottleneck else width
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        self.convs = nnx.List(
            [Conv(i, o, k, stride=s, dtype=dtype, rng=rng) for i, o, k, s in shapes]
        )
        self.norms = nnx.List([BatchNorm(o) for _, o, _, _ in shapes])
        change = stride != 1 or inputs != outputs
        self.downsample: Any = (
            Conv(inputs, outputs, 1, stride=stride, dtype=dtype, rng=rng) if change else None
        )
        self.downsample_norm: Any = BatchNorm(outputs) if change else None

    def __call__(self, x, *, train: bool):
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample_norm(self.downsample(x), train=train)
        last = len(self.convs) - 1
        for i, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(convolution(x), train=train)
            x = jax.nn.relu(x if i < last else x + shortcut)
        return x


class ResNet(nnx.Module):
    """Photo [B, H, W, 3] (normalised) -> features [B, H', W', F].

    Args:
      depth: 18, 34, 50, 101 or 152.
      width: channels of the first stage, 64 in the paper.
      stem: "imagenet" (7x7 stride 2, max pool), for small photos "half" (3x3 stride 2) or "small"
        (3x3 stride 1), no pool.
      last_stride: stride of the last stage, 2 in the paper; 1 keeps the last map of small photos
        larger.
      dtype: of the computation; parameters stay float32.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        stem: str,
        last_stride: int,
        dtype,
        rng: np.random.Generator,
    ):
        if depth not in STAGES:
            raise InputError(f"model.depth={depth}, wanted one of {tuple(STAGES)}")
        if stem not in STEMS:
            raise InputError(f"model.stem={stem!r}, wanted one of {tuple(STEMS)}")
        self.stem = stem
        self.dtype = dtype
        bottleneck = depth >= 50
        size, stride = STEMS[stem]
        self.conv1 = Conv(3, width, size, stride=stride, dtype=dtype, rng=rng)
        self.norm1 = BatchNorm(width)
        channels, stages = width, []
        for stage, blocks in enumerate(STAGES[depth]):
            stage_width = width * 2**stage
            first_stride = (1, 2, 2, last_stride)[stage]
            row = []
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                row.append(
                    Block(
                        channels,
                        stage_width,
                        stride=stride,
                        bottleneck=bottleneck,
                        dtype=dtype,
                        rng=rng,
                    )
                )
                channels = stage_width * (4 if bottleneck else 1)
            stages.append(nnx.List(row))
        self.stages = nnx.List(stages)
        self.num_features = channels

    def __call__(self, image, *, train: bool):
        return self.maps(image, train=train)[-1]

    def maps(self, image, *, train: bool):
        """The last map of each of the four stages."""
        x = image.astype(self.dtype)
        x = jax.nn.relu(self.norm1(self.conv1(x), train=train))
        if self.stem == "imagenet":
            x = max_pool_3x3(x)
        maps = []
        for stage in self.stages:
            for block in stage:
                x = block(x, train=train)
            maps.append(x)
        return maps


def global_average_pool(features):
    """Mean over the map in float32: [B, H, W, F] -> [B, F]."""
    return jnp.mean(features.astype(jnp.float32), (1, 2))
