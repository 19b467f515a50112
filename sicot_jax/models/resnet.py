"""ResNet-10 to 152, v1.5 (stride in the 3x3 convolution), with torchvision's padding and names.

He et al. 2015, arXiv:1512.03385. ResNet-10 is the network of many long-tail benchmarks (Liu et al.
2019, arXiv:1904.05160).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sicot_jax.errors import InputError
from sicot_jax.models.layers import BatchNorm, Conv, max_pool_3x3
from sicot_jax.parallel.array_types import Array, Float

# depth -> residual blocks of each stage
STAGES = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# stem -> size and stride of the first convolution
STEMS = {
    "imagenet": (7, 2),
    "half": (3, 2),
    "small": (3, 1),
}


class ResidualBlock(nnx.Module):
    """Basic block (two 3x3) or bottleneck block (1x1, 3x3, 1x1 with 4 times the width).

    The shortcut is a 1x1 convolution with batch norm where the shape changes, else the identity.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        stride: int,
        bottleneck: bool,
        dtype: DTypeLike,
        rng: np.random.Generator,
    ) -> None:
        """Initialises the block's convolutions and batch norms.

        Args:
          inputs: input channels.
          width: channels of the 3x3 convolution.
          stride: stride of the block.
          bottleneck: whether it is a bottleneck block, of 4 * width output channels.
          dtype: dtype of the computation.
          rng: generator of the starting values.
        """
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

    def __call__(self, x: Float[Array, "B H W I"], *, train: bool) -> Float[Array, "B H2 W2 O"]:
        """Applies the block.

        Args:
          x: float [B, H, W, inputs].
          train: normalise by the statistics of the batch instead of the running ones.

        Returns:
          float [B, ceil(H / stride), ceil(W / stride), outputs], values >= 0.
        """
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample_norm(self.downsample(x), train=train)
        last = len(self.convs) - 1
        for i, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(convolution(x), train=train)
            x = jax.nn.relu(x if i < last else x + shortcut)
        return x


class ResNet(nnx.Module):
    """Backbone: normalised photo [B, H, W, 3] -> feature map [B, h, w, F].

    Attributes:
      num_features: F, channels of the last feature map.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        stem: str,
        last_stride: int,
        dtype: DTypeLike,
        rng: np.random.Generator,
    ) -> None:
        """Initialises the stages.

        Args:
          depth: 10, 18, 34, 50, 101 or 152.
          width: channels of the first stage, 64 in the paper.
          stem: "imagenet" (7x7 stride 2, max pool); for small photos "half" (3x3 stride 2) or
            "small" (3x3 stride 1), without pooling.
          last_stride: stride of the last stage, 2 in the paper; 1 keeps its feature map larger for
            small photos.
          dtype: dtype of the computation; parameters stay float32.
          rng: generator of the starting values.

        Raises:
          InputError: for an unknown depth or stem.
        """
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
        for stage, num_blocks in enumerate(STAGES[depth]):
            stage_width = width * 2**stage
            first_stride = (1, 2, 2, last_stride)[stage]
            blocks = []
            for i in range(num_blocks):
                blocks.append(
                    ResidualBlock(
                        channels,
                        stage_width,
                        stride=first_stride if i == 0 else 1,
                        bottleneck=bottleneck,
                        dtype=dtype,
                        rng=rng,
                    )
                )
                channels = stage_width * (4 if bottleneck else 1)
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.num_features = channels

    def __call__(self, image: Float[Array, "B H W 3"], *, train: bool) -> Float[Array, "B h w F"]:
        """Returns the last feature map.

        Args:
          image: normalised photos, float [B, H, W, 3].
          train: normalise by the statistics of the batch instead of the running ones.

        Returns:
          [B, h, w, F] in `dtype`, values >= 0.
        """
        return self.feature_maps(image, train=train)[-1]

    def feature_maps(self, image: Float[Array, "B H W 3"], *, train: bool) -> list[Array]:
        """Returns the last feature map of each of the four stages, finest first.

        Args:
          image: normalised photos, float [B, H, W, 3].
          train: normalise by the statistics of the batch instead of the running ones.

        Returns:
          four maps [B, h_i, w_i, F_i] in `dtype`, values >= 0.
        """
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


def global_average_pool(features: Float[Array, "B h w F"]) -> Float[Array, "B F"]:
    """Returns the mean over a feature map's cells.

    Args:
      features: float [B, h, w, F].

    Returns:
      float32 [B, F].
    """
    return jnp.mean(features.astype(jnp.float32), (1, 2))
