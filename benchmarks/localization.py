"""Measures how well runs that were trained without boxes localise the product.

Command:  python -m benchmarks.localization RUN[,RUN...]...
          A row for each argument, over several seeds where commas join runs of one catalogue with
          known boxes (configs/localization.py).

A box is right where its intersection over union with the known one is at least 0.5. Contenders:

- the best constant box: the one that is right most often for the training photos;
- a gradient saliency box of the first row's runs: the magnitude of the best logit's gradient by the
  pixels (Simonyan et al. 2014), blurred, the largest region above a share of the maximum; blur and
  share are those that are right most often for the validation photos. Both contenders use known
  boxes, which the network does not;
- the network's box, with the top-1 accuracy and its difference to the first row's runs.

Intervals: 95 %, over test photos and seeds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import ndimage

from benchmarks.finished_runs import open_run_catalog
from benchmarks.timing import print_machine, print_table
from sicot_jax.catalog.catalog import Catalog, Split
from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.parallel import mesh
from sicot_jax.training.provenance import code_commit
from sicot_jax.training.restore import restore_params
from sicot_jax.training.run import fit_run_to_devices, read_run

BLURS, SHARES = (1.0, 2.0, 3.0, 4.0, 6.0), (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
BANDS = ((0.0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1.0))
_BATCH = 100


def iou(box: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of boxes [..., 4]."""
    low, high = np.maximum(box[..., :2], other[..., :2]), np.minimum(box[..., 2:], other[..., 2:])
    shared = np.prod(np.maximum(high - low, 0), -1)
    return shared / (box_area(box) + box_area(other) - shared)


def box_area(box: np.ndarray) -> np.ndarray:
    """Returns the area of boxes [..., 4]."""
    return np.prod(box[..., 2:] - box[..., :2], -1)


def best_constant_box(known: np.ndarray, *, tries: int = 4000) -> np.ndarray:
    """Returns the box, of `tries` random ones, that is right for most of the known ones [N, 4]."""
    rng = np.random.default_rng(0)
    sides = rng.uniform(0.2, 1, (tries, 2))
    low = rng.uniform(0, 1, (tries, 2)) * (1 - sides)
    boxes = np.concatenate([low, low + sides], 1)
    return max(boxes, key=lambda box: (iou(box, known) >= 0.5).mean())


def largest_region_box(saliency: np.ndarray, blur: float, share: float) -> np.ndarray:
    """Returns the box [4] around the heaviest connected region of a saliency map [H, W].

    Regions lie above a share of the blurred maximum.
    """
    blurred = ndimage.gaussian_filter(saliency, blur)
    regions, count = ndimage.label(blurred >= share * blurred.max())
    heaviest = 1 + np.argmax(ndimage.sum(blurred, regions, range(1, count + 1)))
    rows, columns = np.where(regions == heaviest)
    height, width = saliency.shape
    return np.array(
        [
            columns.min() / width,
            rows.min() / height,
            (columns.max() + 1) / width,
            (rows.max() + 1) / height,
        ]
    )


class RunPredictor:
    """A finished run's network on one device."""

    def __init__(self, workdir: Path):
        self.run = read_run(workdir)
        self.mesh = mesh.make_mesh(devices=jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            model = restore_params(fit_run_to_devices(self.run, self.mesh), self.mesh)
            self.class_weights = model.class_weights
            self.parts = model.graphs.visual, model.params["visual"], model.batch_stats["visual"]
        self.has_box = self.run.config.model.localization != "none"

    def images(self, split: Split) -> Iterator[np.ndarray]:
        """Yields batches of preprocessed photos."""
        for first in range(0, len(split), _BATCH):
            photos = [split[i]["image"] for i in range(first, min(first + _BATCH, len(split)))]
            yield self.run.config.preprocessing.batch(photos)

    def predict(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Returns boxes [N, 4], clipped to the photo, and predicted classes [N]."""

        @jax.jit
        def predict_batch(parts, weights, image):
            visual = nnx.merge(*parts, copy=True)
            embedding, box = visual.embed_and_localize(
                self.run.config.preprocessing.normalize(image), train=False
            )
            logits = embedding @ weights.kernel.T + weights.bias
            box = (
                jnp.broadcast_to(jnp.array([0.0, 0, 1, 1]), (len(image), 4)) if box is None else box
            )
            return jnp.clip(box, 0, 1), jnp.argmax(logits, -1)

        with jax.set_mesh(self.mesh):
            batches = [
                jax.device_get(predict_batch(self.parts, self.class_weights, image))
                for image in self.images(split)
            ]
        boxes, classes = map(np.concatenate, zip(*batches, strict=True))
        return boxes, classes

    def saliency(self, split: Split) -> np.ndarray:
        """Returns the gradient magnitude of the best logit, [N, H, W]."""

        @jax.jit
        def gradient(parts, weights, image):
            def best(image):
                embedding = nnx.merge(*parts, copy=True).embed(image, train=False)
                return jnp.sum(jnp.max(embedding @ weights.kernel.T + weights.bias, -1))

            return jnp.max(
                jnp.abs(jax.grad(best)(self.run.config.preprocessing.normalize(image))), -1
            )

        with jax.set_mesh(self.mesh):
            return np.concatenate(
                [
                    np.asarray(gradient(self.parts, self.class_weights, image))
                    for image in self.images(split)
                ]
            )


def saliency_boxes(predictor: RunPredictor, catalog: Catalog) -> np.ndarray:
    """Returns boxes of the test photos, with the blur and share that suit the validation photos."""
    known, maps = (
        known_boxes(catalog.splits["validation"]),
        predictor.saliency(catalog.splits["validation"]),
    )

    def right(setting: tuple[float, float]) -> float:
        return float(
            (
                iou(np.stack([largest_region_box(one, *setting) for one in maps]), known) >= 0.5
            ).mean()
        )

    setting = max(itertools.product(BLURS, SHARES), key=right)
    return np.stack(
        [largest_region_box(one, *setting) for one in predictor.saliency(catalog.splits["test"])]
    )


def known_boxes(split: Split) -> np.ndarray:
    """Returns the known boxes of a split, [N, 4]."""
    return np.stack([split[i]["box"] for i in range(len(split))])


def localization_row(name: str, boxes: np.ndarray, known: np.ndarray, *accuracy: str) -> list[str]:
    """Returns a row for boxes [S, N, 4] of S runs against the known ones [N, 4]."""
    overlap = iou(boxes, known)
    right, areas = overlap >= 0.5, box_area(known)
    low, high = paired_interval(right.astype(float))
    bands = [
        f"{100 * right[:, (areas >= low_area) & (areas < high_area)].mean():.1f}"
        for low_area, high_area in BANDS
    ]
    return [
        name,
        f"{100 * right.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        f"{overlap.mean():.3f}",
        *bands,
        *accuracy,
    ]


def accuracy_cells(right: np.ndarray, before: np.ndarray) -> tuple[str, str]:
    """Returns the accuracy of runs [S, N] and its difference to `before`, in per cent.

    The difference is "" where there are not as many runs before.
    """
    share, difference = f"{100 * right.mean():.1f}", ""
    if right is not before and right.shape == before.shape:
        gains = right.astype(float) - before
        low, high = paired_interval(gains)
        difference = f"{100 * gains.mean():+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    return share, difference


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN[,RUN...]")
    args = parser.parse_args(argv)
    groups = [
        [RunPredictor(Path(workdir)) for workdir in joined.split(",")] for joined in args.runs
    ]
    first = groups[0][0]
    catalog = open_run_catalog(first.run)
    assert all(one.run.data_hash == first.run.data_hash for one in itertools.chain(*groups)), (
        "runs of one catalogue"
    )
    seeds = [[one.run.config.seed for one in group] for group in groups]
    assert all(
        len(group_seeds) != len(seeds[0]) or group_seeds == seeds[0] for group_seeds in seeds
    ), f"seeds in the same order, not {seeds}"
    known, labels = known_boxes(catalog.splits["test"]), np.asarray(catalog.splits["test"].labels)
    rows = [
        localization_row(
            "the best constant box",
            best_constant_box(known_boxes(catalog.splits["train"]))[None, None],
            known,
            "",
            "",
        ),
        localization_row(
            "gradient saliency",
            np.stack([saliency_boxes(one, catalog) for one in groups[0]]),
            known,
            "",
            "",
        ),
    ]
    recognised = []
    for joined, predictors in zip(args.runs, groups, strict=True):
        boxes, predicted = map(
            np.stack,
            zip(
                *(predictor.predict(catalog.splits["test"]) for predictor in predictors),
                strict=True,
            ),
        )
        model = (
            predictors[0].run.config.model.localization if predictors[0].has_box else "whole photo"
        )
        recognised.append(predicted == labels)
        rows.append(
            localization_row(
                f"{joined} ({model})", boxes, known, *accuracy_cells(recognised[-1], recognised[0])
            )
        )
    print_machine()
    bands = [f"area {100 * least:.0f} to {100 * most:.0f} %" for least, most in BANDS]
    print_table(
        f"{len(known)} test photos, commit {code_commit()[:7]}",
        [
            "box",
            "right at IoU 0.5, %",
            "mean IoU",
            *bands,
            "recognised, top-1, %",
            "less the first",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
