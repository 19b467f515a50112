"""Accuracy with the largest entries of the gradients alone, and what crosses devices for it in a
step.

Command:  JAX_NUM_CPU_DEVICES=8 python -m benchmarks.gradient_compression --config generated
  --config.eval.batch_size=120 \\
          --out runs/sparse_gradients
Again:    the same command: runs that have ended are not trained again, one that was stopped goes
  on.
Table:    test accuracy in per cent after the same steps from the same seed; differences to the
  first ratio's over the
          same photos, with 95 % intervals (over photos, so without the luck of training). "sent" is
          what a device sends of the streams' gradients in a step, by the plan. Speed wants a real
          network, so there is none here.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax

from benchmarks import timing
from benchmarks import run_comparison as training
from sicot_jax import config as config_lib
from sicot_jax.config import Config
from sicot_jax.training import loop as train
from sicot_jax.training import run as runs
from sicot_jax.training.memory import plan


def sent(workdir: Path, devices: int) -> float:
    """Bytes of gradients of the streams that a device sends in a step."""
    run = runs.read_run(workdir)
    messages = plan.make_plan(run.config, run.shape, devices=devices, platform="cpu").messages()
    return sum(
        m.sent(devices)
        for name, m in messages.items()
        if name.startswith("streams: ") and "gradient" in name
    )


def compare(config: Config, ratios: list[float], out: Path) -> None:
    config = training.tested_at_the_end(config)
    devices, rows, costs, first = runs.start_mesh(config).size, [], [], out / f"ratio_{ratios[0]}"
    for ratio in ratios:
        workdir = out / f"ratio_{ratio}"
        changed = dataclasses.replace(
            config, train=dataclasses.replace(config.train, gradient_ratio=ratio)
        )
        results = train.train(changed, workdir)
        costs.append(sent(workdir, devices))
        cost = f"{costs[-1] / 2**20:.3f}", f"{costs[-1] / costs[0]:.3f}"
        rows.append((f"{ratio:g}", *training.row(workdir, results, first), *cost))
    header = ("ratio", *training.HEADER, f"MiB sent, {devices} devices", "of the first's")
    timing.print_table(training.title(out.name, config, results), header, rows)


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
