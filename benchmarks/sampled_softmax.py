"""Compares the accuracy of sampled heads with the full softmax, and measures graph staleness.

Command:  python -m benchmarks.sampled_softmax --config fashion --config.loss.mixed=0
          --out runs/sampled_softmax/fashion
Again:    the same command: completed runs are not trained again, an interrupted one resumes.
Table:    test accuracy in per cent after the same steps from the same seed; differences to the full
          softmax over the same photos, with 95 % intervals (over photos, so without the variance
          of training). "recall" is the share of each class's nearest classes at the end of the run
          that its graph still contains.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from benchmarks import run_comparison, timing
from sicot_jax import config as config_lib
from sicot_jax.classifier.knn_graph import knn_graph
from sicot_jax.config import Config, HeadConfig
from sicot_jax.training import loop as train
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.model import compute_dtype
from sicot_jax.training.run import mesh_of_config, read_run
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import abstract_state


def contenders(head: HeadConfig, rates: list[float]) -> dict[str, HeadConfig]:
    """Returns name -> head, the full softmax first."""
    heads = {"class_sharded": dataclasses.replace(head, kind="class_sharded")}
    for kind in ("sampled", "knn"):
        heads |= {
            f"{kind}_{rate}": dataclasses.replace(head, kind=kind, sample_rate=rate)
            for rate in rates
        }
    return heads


def graph_recall(workdir: Path) -> tuple[float, int]:
    """Returns the recall of the last state's graph, and its age in steps.

    The recall is the share of the classes that are nearest at the end that the graph contains.
    """
    run = read_run(workdir)
    device_mesh = mesh_of_config(run.config)
    with jax.set_mesh(device_mesh):
        checkpoints = Checkpoints(workdir, num_classes=run.shape.num_classes)
        classifier = checkpoints.restore(
            abstract_state(make_setup(run.config, run.shape, device_mesh))
        ).classifier
        checkpoints.close()
        build = jax.jit(
            lambda kernel: knn_graph(
                kernel,
                num_classes=run.shape.num_classes,
                k=run.config.head.neighbours,
                dtype=compute_dtype(run.config),
            )
        )
        nearest = np.asarray(build(classifier.weights.kernel))[: run.shape.num_classes]
    in_graph = np.asarray(classifier.sampling.neighbours)[: run.shape.num_classes]
    shared = [len(np.intersect1d(a, b)) for a, b in zip(nearest, in_graph, strict=True)]
    step = int(classifier.sampling.step)
    # The graph is built before the steps 0, rebuild_steps, ...
    return float(np.mean(shared)) / nearest.shape[1], step - (
        step - 1
    ) // run.config.head.rebuild_steps * run.config.head.rebuild_steps


def compare(config: Config, rates: list[float], out: Path) -> None:
    rows = []
    config = run_comparison.with_one_validation(config)
    for name, head in contenders(config.head, rates).items():
        results = train.train(dataclasses.replace(config, head=head), out / name)
        recall = ""
        if head.kind == "knn":
            share, age = graph_recall(out / name)
            recall = f"{100 * share:.1f} % after {age}"
        rows.append(
            (
                name.replace("_", " "),
                *run_comparison.accuracy_row(out / name, results, out / "class_sharded"),
                recall,
            )
        )
    timing.print_table(
        run_comparison.table_title(out.name, config, results),
        ("head", *run_comparison.HEADER, "recall"),
        rows,
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
