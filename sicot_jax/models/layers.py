"""Batch norm, convolution, linear layer and pooling with PyTorch's padding and statistics.

Flax has modules of the same names. Ours remain because converted torchvision weights must give
equal outputs (padding of strided convolutions), batch-norm statistics are those of all devices
inside `shard_map` and can leave rows out, and starting values are drawn by NumPy: the same on every
mesh, and XLA takes a second of compilation for each shape of random array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from sicot_jax.parallel.array_types import Array, Bool, Float
from sicot_jax.parallel.mesh import mean_over_devices

BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9  # torch calls this 0.1


def batch_moments(
    x: Float[Array, "B ... F"], mask: Bool[Array, " B"] | None = None
) -> tuple[Float[Array, " F"], Float[Array, " F"]]:
    """Returns mean and biased variance over all axes but the last, and over all devices.

    Args:
      x: activations, any float dtype, [B, ..., F].
      mask: bool [B]; rows that are False are left out, None counts all. With no True row both
        moments are zero.

    Returns:
      mean and variance, float32 [F] each.
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    if mask is None:
        mean = mean_over_devices(jnp.mean(x, axes))
        # Two passes: E[x^2] - E[x]^2 loses all digits when the mean is large against the deviation.
        # The variance's derivative by the mean is 0, and would be summed over devices only to find
        # that.
        return mean, mean_over_devices(jnp.mean(jnp.square(x - lax.stop_gradient(mean)), axes))
    weight = mask.astype(jnp.float32).reshape(mask.shape + (1,) * (x.ndim - 1))
    share = mean_over_devices(jnp.mean(weight))
    share = jnp.where(share > 0, share, 1.0)
    mean = mean_over_devices(jnp.mean(x * weight, axes)) / share
    return mean, mean_over_devices(
        jnp.mean(jnp.square(x - lax.stop_gradient(mean)) * weight, axes)
    ) / share


def _normalize(x: Array, mean: Array, variance: Array, scale: Array, bias: Array) -> Array:
    # (x - mean) / sqrt(variance + epsilon) * scale + bias as one multiply and one add, in x's
    # dtype.
    factor = scale * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON)
    return (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch norm over all axes but the last, with float32 statistics over all devices of the mesh.

    running <- 0.9 * running + 0.1 * batch. The running variance is the biased one (torch's is n /
    (n - 1) times it). Ioffe & Szegedy 2015.
    """

    def __init__(self, width: int, *, scale_init: float = 1.0) -> None:
        """Initialises scale, bias and running statistics.

        Args:
          width: F, number of channels.
          scale_init: starting value of the scale.
        """
        self.scale = nnx.Param(jnp.full((width,), scale_init, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((width,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((width,), jnp.float32))

    def __call__(
        self, x: Float[Array, "B ... F"], *, train: bool, mask: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B ... F"]:
        """Normalises activations; in training updates the running statistics.

        Args:
          x: activations, any float dtype, [B, ..., F].
          train: use the statistics of the batch instead of the running ones.
          mask: bool [B]; rows that are False are left out of the statistics, not of the output. A
            batch without a True row keeps the running statistics.

        Returns:
          normalised activations, the shape and dtype of x.
        """
        if not train:
            return _normalize(x, self.mean[...], self.var[...], self.scale[...], self.bias[...])
        mean, variance = batch_moments(x, mask)
        rate = jnp.float32(1 - BATCH_NORM_MOMENTUM)
        if mask is not None:
            rate = jnp.where(mean_over_devices(jnp.mean(mask)) > 0, rate, 0.0)
        self.mean[...] = self.mean[...] + rate * (mean - self.mean[...])
        self.var[...] = self.var[...] + rate * (variance - self.var[...])
        return _normalize(x, mean, variance, self.scale[...], self.bias[...])


class Conv(nnx.Module):
    """Convolution without bias, padded as torch does by `size // 2` on every side.

    "SAME" of XLA pads strided convolutions unevenly. Kernel [size, size, inputs, outputs] ~ N(0, 2
    / (size^2 outputs)) (He et al. 2015, fan out).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        dtype: DTypeLike,
        rng: np.random.Generator,
    ) -> None:
        """Initialises the kernel.

        Args:
          inputs: input channels.
          outputs: output channels.
          size: height and width of the kernel, odd.
          stride: step between outputs, in pixels.
          dtype: dtype of the computation; the kernel stays float32.
          rng: generator of the starting values.
        """
        self.stride, self.dtype = stride, dtype
        self.kernel = nnx.Param(
            _normal(rng, (size, size, inputs, outputs), (2 / (size * size * outputs)) ** 0.5)
        )

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H2 W2 O"]:
        """Applies the convolution.

        Args:
          x: float [B, H, W, inputs].

        Returns:
          [B, ceil(H / stride), ceil(W / stride), outputs] in `dtype`.
        """
        return conv(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride)


def conv(
    x: Float[Array, "B H W I"], kernel: Float[Array, "k k I O"], stride: int
) -> Float[Array, "B H2 W2 O"]:
    """Returns a convolution with torch's symmetric padding.

    A map smaller than the kernel is computed as one product of patches: XLA's CPU convolution, with
    its gradients, takes up to 13 times as long there (`benchmarks/convolution.py`).

    Args:
      x: float [B, H, W, I].
      kernel: float [k, k, I, O], k odd.
      stride: step between outputs, in pixels.

    Returns:
      float [B, ceil(H / stride), ceil(W / stride), O].
    """
    size = kernel.shape[0]
    if size > 1 and -(-min(x.shape[1:3]) // stride) < size:
        return conv_im2col(x, kernel, stride)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(size // 2, size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def conv_im2col(
    x: Float[Array, "B H W I"], kernel: Float[Array, "k k I O"], stride: int
) -> Float[Array, "B H2 W2 O"]:
    """Returns `conv` as one matrix product of patches, [B H' W', k k I] @ [k k I, O].

    Args:
      x: float [B, H, W, I].
      kernel: float [k, k, I, O], k odd.
      stride: step between outputs, in pixels.

    Returns:
      float [B, ceil(H / stride), ceil(W / stride), O].
    """
    size, _, _, outputs = kernel.shape
    batch, height, width, _ = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    x = jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    slices = [
        x[
            :,
            top : top + stride * (rows - 1) + 1 : stride,
            left : left + stride * (columns - 1) + 1 : stride,
        ]
        for top in range(size)
        for left in range(size)
    ]
    patches = jnp.concatenate(slices, -1).reshape(batch * rows * columns, -1)
    return (patches @ kernel.reshape(-1, outputs)).reshape(batch, rows, columns, outputs)


class Linear(nnx.Module):
    """Linear layer x @ kernel (+ bias); kernel [inputs, outputs] ~ N(0, 1 / inputs)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        dtype: DTypeLike,
        rng: np.random.Generator,
    ) -> None:
        """Initialises kernel and bias.

        Args:
          inputs: input channels.
          outputs: output channels.
          bias: whether there is a bias, zero at the start.
          dtype: dtype of the computation; parameters stay float32.
          rng: generator of the starting values.
        """
        self.dtype = dtype
        self.kernel = nnx.Param(_normal(rng, (inputs, outputs), inputs**-0.5))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Applies the layer.

        Args:
          x: float [..., inputs].

        Returns:
          [..., outputs] in `dtype`.
        """
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(deviation))


def max_pool_3x3(x: Float[Array, "B H W F"]) -> Float[Array, "B H2 W2 F"]:
    """Returns 3x3 max pooling with stride 2 and padding 1.

    First over three rows, then over three columns, each the maximum of shifted slices: XLA fuses
      the gradient of six slices well, that of nine badly, and that of reduce_window not at all
      (`benchmarks/convolution.py`).

    Args:
      x: float [B, H, W, F].

    Returns:
      [B, ceil(H / 2), ceil(W / 2), F] in x's dtype.
    """
    return _max_of_three(_max_of_three(x, 1), 2)


def _max_of_three(x: Array, axis: int) -> Array:
    count = (x.shape[axis] + 1) // 2
    x = jnp.pad(
        x,
        [(0, 0)] * axis + [(1, 1)] + [(0, 0)] * (3 - axis),
        constant_values=jnp.finfo(x.dtype).min,
    )
    pieces = [lax.slice_in_dim(x, first, first + 2 * count - 1, 2, axis) for first in range(3)]
    return jnp.maximum(jnp.maximum(*pieces[:2]), pieces[2])
