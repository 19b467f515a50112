"""Compares the accuracy with top-k compressed gradients, and counts the bytes sent in a step.

Command:  JAX_NUM_CPU_DEVICES=8 python -m benchmarks.gradient_compression --config generated
          --config.eval.batch_size=120 --out runs/gradient_compression
Again:    the same command: completed runs are not trained again, an interrupted one resumes.
Table:    test accuracy in per cent after the same steps from the same seed; differences to the
          first ratio's over the same photos, with 95 % intervals (over photos, so without the
          variance of training). "sent" is what a device sends of the streams' gradients in a step,
          by the memory plan. Speed needs a real network, so it is not measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax

from benchmarks import run_comparison, timing
from sicot_jax import config as config_lib
from sicot_jax.config import Config
from sicot_jax.training import loop as train
from sicot_jax.training.memory.plan import make_memory_plan, step_collectives
from sicot_jax.training.run import mesh_of_config, read_run


def bytes_sent(workdir: Path, devices: int) -> float:
    """Returns the bytes of the streams' gradients that a device sends in a step."""
    run = read_run(workdir)
    plan = make_memory_plan(run.config, run.shape, devices=devices, platform="cpu")
    return sum(
        collective.bytes_sent(devices)
        for name, collective in step_collectives(plan).items()
        if name.startswith("streams: ") and "gradient" in name
    )


def compare(config: Config, ratios: list[float], out: Path) -> None:
    config = run_comparison.with_one_validation(config)
    devices, rows, costs, first = mesh_of_config(config).size, [], [], out / f"ratio_{ratios[0]}"
    for ratio in ratios:
        workdir = out / f"ratio_{ratio}"
        changed = dataclasses.replace(
            config, train=dataclasses.replace(config.train, gradient_ratio=ratio)
        )
        results = train.train(changed, workdir)
        costs.append(bytes_sent(workdir, devices))
        cost = f"{costs[-1] / 2**20:.3f}", f"{costs[-1] / costs[0]:.3f}"
        rows.append((f"{ratio:g}", *run_comparison.accuracy_row(workdir, results, first), *cost))
    header = ("ratio", *run_comparison.HEADER, f"MiB sent, {devices} devices", "of the first's")
    timing.print_table(run_comparison.table_title(out.name, config, results), header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--ratios", nargs="+", type=float, default=[1.0, 0.1, 0.01, 0.001])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, one each")
    args, overrides = parser.parse_known_args()
    if jax.device_count() == 1:
        parser.error("one device sends nothing; on CPU set JAX_NUM_CPU_DEVICES=8")
    timing.print_machine()
    compare(config_lib.load_config(args.config, overrides), args.ratios, args.out)


if __name__ == "__main__":
    main()
