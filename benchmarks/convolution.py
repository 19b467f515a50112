"""Compares convolutions and max pooling of the ResNet by XLA with hand-written ones.

Convolutions of late maps against one product of patches; max pooling against shifted slices.
Forward and backward.

Command:  python -m benchmarks.convolution
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    median_text,
    print_machine,
    print_table,
    range_text,
    ratio_text,
    run_rounds,
)
from sicot_jax.models import layers

# (height, width, inputs, outputs, size, stride): stages of ResNet-18 on small photos.
SHAPES = (
    (10, 8, 64, 64, 3, 1),
    (5, 4, 128, 128, 3, 1),
    (5, 4, 64, 128, 3, 2),
    (3, 2, 128, 128, 3, 1),
    (2, 1, 256, 256, 3, 1),
)


def native(x, kernel, stride: int):
    """Applies XLA's convolution, whatever the map."""
    size = kernel.shape[0]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(size // 2, size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


CONTENDERS: dict[str, Callable] = {
    "XLA": native,
    "patches": layers.conv_im2col,
    "sicot_jax": layers.conv,
}


def contender(convolution: Callable, shape: Sequence[int], batch: int) -> Callable[[], float]:
    """Returns a function that measures milliseconds of one forward and backward pass."""
    height, width, inputs, outputs, size, stride = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, height, width, inputs)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, inputs, outputs)), jnp.float32)

    @jax.jit
    def both(x, kernel):
        y, pull = jax.vjp(lambda x, kernel: convolution(x, kernel, stride), x, kernel)
        return y, pull(y)

    jax.block_until_ready(both(x, kernel))

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(both(x, kernel))
        return 1000 * (time.perf_counter() - start)

    return run


# (height, width, features) of what is pooled: photos of 40x30 and 224x224 pixels after the first
# convolution.
POOLED = ((20, 15, 16), (112, 112, 64))


def reduce_window(x):
    """Applies XLA's pooling."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def nine_slices(x):
    """Returns the maximum over nine shifted slices."""
    height, width = x.shape[1:3]
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    slices = [
        x[:, top : top + 2 * rows - 1 : 2, left : left + 2 * columns - 1 : 2]
        for top in range(3)
        for left in range(3)
    ]
    return functools.reduce(jnp.maximum, slices)


POOLS: dict[str, Callable] = {
    "XLA": reduce_window,
    "nine slices": nine_slices,
    "sicot_jax": layers.max_pool_3x3,
}


def pooling(pool: Callable, shape: Sequence[int], batch: int) -> Callable[[], float]:
    """Returns a function that measures milliseconds of ReLU and pooling, forward and backward."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *shape)), jnp.float32)

    @jax.jit
    def both(x):
        y, pull = jax.vjp(lambda x: pool(jax.nn.relu(x)), x)
        return y, pull(y)

    jax.block_until_ready(both(x))

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(both(x))
        return 1000 * (time.perf_counter() - start)

    return run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    rows = []
    for shape in SHAPES:
        times = run_rounds(
            {name: contender(c, shape, args.batch) for name, c in CONTENDERS.items()}, args.rounds
        )
        height, width, inputs, outputs, size, stride = shape
        for name, times_of_contender in times.items():
            row = f"{height}x{width}, {inputs} to {outputs}, {size}x{size} stride {stride}: {name}"
            rows.append(
                [
                    row,
                    median_text(times_of_contender, 1),
                    ratio_text(times_of_contender, times["XLA"]),
                    range_text(times_of_contender, 1),
                ]
            )
    for shape in POOLED:
        times = run_rounds(
            {name: pooling(pool, shape, args.batch) for name, pool in POOLS.items()}, args.rounds
        )
        for name, times_of_contender in times.items():
            row = f"pooling {'x'.join(map(str, shape))}: {name}"
            rows.append(
                [
                    row,
                    median_text(times_of_contender, 1),
                    ratio_text(times_of_contender, times["XLA"]),
                    range_text(times_of_contender, 1),
                ]
            )
    print_machine(args.rounds)
    header = ["forward and backward", "ms", "of XLA's", "ms, range"]
    print_table(f"{args.batch} photos", header, rows)


if __name__ == "__main__":
    main()
