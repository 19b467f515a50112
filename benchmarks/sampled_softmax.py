"""Accuracy of the sampled heads against the full softmax, and how much of the neighbour graph
outlives its making.

Command:  python -m benchmarks.sampled_softmax --config fashion --config.loss.mixed=0 --out
  runs/sampled_heads/fashion
Again:    the same command: runs that have ended are not trained again, one that was stopped goes
  on.
Table:    test accuracy in per cent after the same steps from the same seed; differences to the full
  softmax over the same
          photos, with 95 % intervals (over photos, so without the luck of training). "recall" is
          the share of each class's nearest classes at the end of the run that its graph still
          names.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from benchmarks import timing
from benchmarks import run_comparison as training
from sicot_jax import config as config_lib
from sicot_jax.classifier import sampling as sampled
from sicot_jax.config import Config, HeadConfig
from sicot_jax.training import loop as train
from sicot_jax.training import run as runs
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.state import abstract_state
from sicot_jax.training.setup import make_setup
from sicot_jax.training.model import compute_dtype


def contenders(head: HeadConfig, rates: list[float]) -> dict[str, HeadConfig]:
    """Name -> head: the full softmax first."""
    heads = {"class_sharded": dataclasses.replace(head, kind="class_sharded")}
    for kind in ("sampled", "knn"):
        heads |= {
            f"{kind}_{rate}": dataclasses.replace(head, kind=kind, sample_rate=rate)
            for rate in rates
        }
    return heads


def graph_recall(workdir: Path) -> tuple[float, int]:
    """(share of the nearest classes of now that the graph of the run's last state names, the
    graph's age in steps).
    """
    run = runs.read_run(workdir)
    device_mesh = runs.start_mesh(run.config)
    with jax.set_mesh(device_mesh):
        checkpoints = Checkpoints(workdir, num_classes=run.shape.num_classes)
        classifier = checkpoints.restore(
            abstract_state(make_setup(run.config, run.shape, device_mesh))
        ).classifier
        checkpoints.close()
        build = jax.jit(
            lambda kernel: sampled.class_graph(
                kernel,
                num_classes=run.shape.num_classes,
                k=run.config.head.neighbours,
                dtype=compute_dtype(run.config),
            )
        )
        now = np.asarray(build(classifier.kernel))[: run.shape.num_classes]
    then = np.asarray(classifier.sampling["neighbours"])[: run.shape.num_classes]
    shared = [len(np.intersect1d(a, b)) for a, b in zip(now, then, strict=True)]
    step = int(classifier.sampling["step"])
    # The graph is made before the steps 0, rebuild_steps, ...
    return float(np.mean(shared)) / now.shape[1], step - (
        step - 1
    ) // run.config.head.rebuild_steps * run.config.head.rebuild_steps


def compare(config: Config, rates: list[float], out: Path) -> None:
    rows = []
    config = training.tested_at_the_end(config)
    for name, head in contenders(config.head, rates).items():
        results = train.train(dataclasses.replace(config, head=head), out / name)
        recall = ""
        if head.kind == "knn":
            share, age = graph_recall(out / name)
            recall = f"{100 * share:.1f} % after {age}"
        rows.append(
            (
                name.replace("_", " "),
                *training.row(out / name, results, out / "class_sharded"),
                recall,
            )
        )
    timing.print_table(
        training.title(out.name, config, results), ("head", *training.HEADER, "recall"), rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, one each")
    args, overrides = parser.parse_known_args()
    timing.print_machine()
    compare(config_lib.load_config(args.config, overrides), args.rates, args.out)


if __name__ == "__main__":
    main()
