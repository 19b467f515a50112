"""How often the product is found in a photo, by runs with a box branch that have seen no box.

Command:  python -m benchmarks.localization RUN[,RUN...]...      (a row for each, of several seeds where
  commas join them; runs of one
          catalogue, whose boxes are known; see configs/boxes.py)

A box is right where it and the known one share half of what both cover (IoU 0.5). Beside the runs'
boxes:

- the best constant box: the one that is right most often for the training photos;
- a gradient-saliency box, of the first row's runs: the magnitude of the best logit's gradient by
  the pixels (Simonyan et al.
  2014), blurred, the largest piece above a share of the maximum; blur and share are those that are
  right most often for the validation photos. Both so know boxes, which the branch does not.
- how often the product is recognised, and how much more often than by the first row's runs, of the
  same seeds in order.

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

from benchmarks.finished_runs import catalog_of
from benchmarks.timing import print_machine, print_table
from sicot_jax.catalog.catalog import Catalog, Split
from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.parallel import mesh
from sicot_jax.training import evaluate
from sicot_jax.training import run as runs

BLURS, SHARES = (1.0, 2.0, 3.0, 4.0, 6.0), (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
BANDS = ((0.0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1.0))
_BATCH = 100


def iou(box: np.ndarray, other: np.ndarray) -> np.ndarray:
    """What two boxes [..., 4] share, of what they cover."""
    low, high = np.maximum(box[..., :2], other[..., :2]), np.minimum(box[..., 2:], other[..., 2:])
    shared = np.prod(np.maximum(high - low, 0), -1)
    return shared / (area(box) + area(other) - shared)


def area(box: np.ndarray) -> np.ndarray:
    return np.prod(box[..., 2:] - box[..., :2], -1)


def best_constant(known: np.ndarray, *, tries: int = 4000) -> np.ndarray:
    """The box, of so many random ones, that is right for most of the known ones [N, 4]."""
    rng = np.random.default_rng(0)
    side = rng.uniform(0.2, 1, (tries, 2))
    low = rng.uniform(0, 1, (tries, 2)) * (1 - side)
    boxes = np.concatenate([low, low + side], 1)
    return max(boxes, key=lambda box: (iou(box, known) >= 0.5).mean())


def around(saliency: np.ndarray, blur: float, share: float) -> np.ndarray:
    """[H, W] -> the box [4] around the heaviest connected piece above a share of the blurred
    maximum.
    """
    smooth = ndimage.gaussian_filter(saliency, blur)
    pieces, count = ndimage.label(smooth >= share * smooth.max())
    heaviest = 1 + np.argmax(ndimage.sum(smooth, pieces, range(1, count + 1)))
    rows, columns = np.where(pieces == heaviest)
    height, width = saliency.shape
    return np.array(
        [
            columns.min() / width,
            rows.min() / height,
            (columns.max() + 1) / width,
            (rows.max() + 1) / height,
        ]
    )


class Looker:
    """A finished run's network on one device."""

    def __init__(self, workdir: Path):
        self.run = runs.read_run(workdir)
        self.mesh = mesh.make_mesh(devices=jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            setup, state = runs.restore_finished(
                runs.on_devices_here(self.run, self.mesh), self.mesh
            )
            self.classifier = evaluate.plain_classifier(state)
            self.parts = setup.visual_graphdef, state.params["visual"], state.batch_stats["visual"]
        self.has_box = self.run.config.model.localization != "none"

    def images(self, split: Split) -> Iterator[np.ndarray]:
        for first in range(0, len(split), _BATCH):
            photos = [split[i]["image"] for i in range(first, min(first + _BATCH, len(split)))]
            yield self.run.config.preprocessing.batch(photos)

    def found(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4], cut at the photo's edges, and the classes told [N]."""

        @jax.jit
        def look(parts, classifier, image):
            visual = nnx.merge(*parts, copy=True)
            embedding, box = visual.embed_and_localize(
                self.run.config.preprocessing.normalise(image), train=False
            )
            logits = embedding @ classifier.kernel.T + classifier.bias
            box = (
                jnp.broadcast_to(jnp.array([0.0, 0, 1, 1]), (len(image), 4)) if box is None else box
            )
            return jnp.clip(box, 0, 1), jnp.argmax(logits, -1)

        with jax.set_mesh(self.mesh):
            batches = [
                jax.device_get(look(self.parts, self.classifier, image))
                for image in self.images(split)
            ]
        boxes, classes = map(np.concatenate, zip(*batches, strict=True))
        return boxes, classes

    def saliency(self, split: Split) -> np.ndarray:
        """[N, H, W]."""

        @jax.jit
        def gradient(parts, classifier, image):
            def best(image):
                embedding = nnx.merge(*parts, copy=True).embed(image, train=False)
                return jnp.sum(jnp.max(embedding @ classifier.kernel.T + classifier.bias, -1))

            return jnp.max(
                jnp.abs(jax.grad(best)(self.run.config.preprocessing.normalise(image))), -1
            )

        with jax.set_mesh(self.mesh):
            return np.concatenate(
                [
                    np.asarray(gradient(self.parts, self.classifier, image))
                    for image in self.images(split)
                ]
            )


def saliency_boxes(looker: Looker, catalog: Catalog) -> np.ndarray:
    """Of the test photos, with the blur and share that suit the validation photos."""
    known, maps = (
        boxes_of(catalog.splits["validation"]),
        looker.saliency(catalog.splits["validation"]),
    )

    def right(setting: tuple[float, float]) -> float:
        return float((iou(np.stack([around(one, *setting) for one in maps]), known) >= 0.5).mean())

    setting = max(itertools.product(BLURS, SHARES), key=right)
    return np.stack([around(one, *setting) for one in looker.saliency(catalog.splits["test"])])


def boxes_of(split: Split) -> np.ndarray:
    """The known ones, [N, 4]."""
    return np.stack([split[i]["box"] for i in range(len(split))])


def row(name: str, boxes: np.ndarray, known: np.ndarray, *accuracy: str) -> list[str]:
    """boxes [S, N, 4] of S runs against the known ones [N, 4]."""
    shared = iou(boxes, known)
    right, areas = shared >= 0.5, area(known)
    low, high = paired_interval(right.astype(float))
    bands = [
        f"{100 * right[:, (areas >= least) & (areas < most)].mean():.1f}" for least, most in BANDS
    ]
    return [
        name,
        f"{100 * right.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        f"{shared.mean():.3f}",
        *bands,
        *accuracy,
    ]


def recognition(right: np.ndarray, before: np.ndarray) -> tuple[str, str]:
    """Of runs [S, N]; the difference where there are as many runs before."""
    share, less = f"{100 * right.mean():.1f}", ""
    if right is not before and right.shape == before.shape:
        more = right.astype(float) - before
        low, high = paired_interval(more)
        less = f"{100 * more.mean():+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    return share, less


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN[,RUN...]")
    args = parser.parse_args(argv)
    groups = [[Looker(Path(workdir)) for workdir in joined.split(",")] for joined in args.runs]
    first = groups[0][0]
    catalog = catalog_of(first.run)
    assert all(one.run.data_hash == first.run.data_hash for one in itertools.chain(*groups)), (
        "runs of one catalogue"
    )
    seeds = [[one.run.config.seed for one in group] for group in groups]
    assert all(len(own) != len(seeds[0]) or own == seeds[0] for own in seeds), (
        f"seeds in the same order, not {seeds}"
    )
    known, labels = boxes_of(catalog.splits["test"]), np.asarray(catalog.splits["test"].labels)
    rows = [
        row(
            "the best constant box",
            best_constant(boxes_of(catalog.splits["train"]))[None, None],
            known,
            "",
            "",
        ),
        row(
            "gradient saliency",
            np.stack([saliency_boxes(one, catalog) for one in groups[0]]),
            known,
            "",
            "",
        ),
    ]
    recognised = []
    for joined, lookers in zip(args.runs, groups, strict=True):
        boxes, told = map(
            np.stack,
            zip(*(looker.found(catalog.splits["test"]) for looker in lookers), strict=True),
        )
        model = lookers[0].run.config.model.localization if lookers[0].has_box else "whole photo"
        recognised.append(told == labels)
        rows.append(
            row(f"{joined} ({model})", boxes, known, *recognition(recognised[-1], recognised[0]))
        )
    print_machine()
    bands = [f"area {100 * least:.0f} to {100 * most:.0f} %" for least, most in BANDS]
    print_table(
        f"{len(known)} test photos, commit {runs.commit()[:7]}",
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
