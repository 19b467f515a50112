"""Convolutions of the ResNet's late maps: XLA's own against one product of patches, forward and backward.

python -m benchmarks.convolution
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import in_turn, middle, print_machine, print_table, ratio, spread
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
    """XLA's convolution, whatever the map."""
    size = kernel.shape[0]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(size // 2, size // 2)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


CONTENDERS: dict[str, Callable] = {"XLA": native, "patches": layers.conv_of_patches, "sicot_jax": layers.conv}


def contender(convolution: Callable, shape: Sequence[int], batch: int) -> Callable[[], float]:
    """-> milliseconds of one forward and backward pass, compiled before."""
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    rows = []
    for shape in SHAPES:
        times = in_turn({name: contender(c, shape, args.batch) for name, c in CONTENDERS.items()}, args.rounds)
        height, width, inputs, outputs, size, stride = shape
        for name, found in times.items():
            row = f"{height}x{width}, {inputs} to {outputs}, {size}x{size} stride {stride}: {name}"
            rows.append([row, middle(found, 1), ratio(found, times["XLA"]), spread(found, 1)])
    print_machine(args.rounds)
    header = ["forward and backward", "ms", "of XLA's", "ms, range"]
    print_table(f"{args.batch} photos", header, rows)


if __name__ == "__main__":
    main()
