"""Measures how well transferred titles agree with the true ones.

Photos whose title is known are given the title of the nearest photo of a run's training split, as
an import with title transfer does.

Command:  python -m benchmarks.title_transfer --run runs/fashion/co_training
Smaller:  add --photos 1000
Table:    "train" photos take part in the run's training and are each left out of the search; "test"
          photos are new to it, like those of another catalogue. "random" transfers the title of any
          other training photo. Recall: share of the true title's known words that the transferred
          title has; precision: share of its known words that the true title has; means over photos
          whose true, or transferred, title has a known word.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks import timing
from sicot_jax.catalog.catalog import Record, Split
from sicot_jax.experiments.title_transfer import TitleTransfer, open_title_transfer

HEADER = ("titles", "photos", "filled", "recall", "precision", "same class", "median similarity")


class _Photos(Sequence):
    """(image_id, photo) of some records of a split, read one at a time."""

    def __init__(self, split: Split, indices: np.ndarray):
        self.split, self.indices = split, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        record = self.split[int(self.indices[index])]
        return record["image_id"], record["image"]


def title_agreement(true: Record, transferred: Record) -> tuple[float, float, bool]:
    """Returns recall and precision of known words (NaN without any), and class equality."""
    true_words, words = set(true["token_ids"].tolist()), set(transferred["token_ids"].tolist())
    num_shared = len(true_words & words)
    recall = num_shared / len(true_words) if true_words else np.nan
    return (
        recall,
        num_shared / len(words) if words else np.nan,
        true["class_id"] == transferred["class_id"],
    )


def row(
    source: TitleTransfer,
    true: Sequence[Record],
    title_rows: np.ndarray,
    name: str,
    similarity: str,
) -> tuple[str, ...]:
    """Returns a table row; `title_rows` [Q] index `source.titled`, -1: no title is transferred."""
    train = source.catalog.splits["train"]
    agreements = [
        title_agreement(record, train[int(source.titled[title_row])])
        for record, title_row in zip(true, title_rows, strict=True)
        if title_row >= 0
    ]
    shares = (
        np.nanmean(np.array(agreements, float).reshape(-1, 3), 0)
        if agreements
        else np.full(3, np.nan)
    )
    filled = 100 * len(agreements) / len(true)
    return (
        name,
        f"{len(true):,}",
        f"{filled:.1f} %",
        *(f"{100 * share:.1f} %" for share in shares),
        similarity,
    )


def rows(
    source: TitleTransfer, split_name: str, max_photos: int, limits: Sequence[float]
) -> Iterator[tuple[str, ...]]:
    """Yields rows for the nearest photo's title by each limit, then for random titles."""
    split = source.catalog.splits[split_name]
    titled = np.flatnonzero([bool(split[i]["title"].strip()) for i in range(len(split))])
    if not len(titled):
        yield split_name, "no photo with a title"
        return
    count = min(max_photos, len(titled)) if max_photos else len(titled)
    indices = titled[np.arange(count) * len(titled) // count]
    true = [Record({**split[int(i)], "image": b""}) for i in indices]
    title_rows, similarity = source.nearest_titled(_Photos(split, indices))
    for limit in limits:
        accepted = np.where(similarity >= limit, title_rows, -1)
        median = f"{np.median(similarity[accepted >= 0]):.3f}" if (accepted >= 0).any() else ""
        yield row(
            source,
            true,
            accepted,
            f"{split_name}, nearest" + (f" from {limit:g}" if limit else ""),
            median,
        )
    # Any photo but itself: 1 to N - 1 rows further on.
    total = len(source.titled)
    photo_rows = (
        np.searchsorted(source.titled, indices) if split_name == "train" else np.zeros(count, int)
    )
    steps = np.random.default_rng(0).integers(1, max(total, 2), count)
    yield row(source, true, (photo_rows + steps) % total, f"{split_name}, random", "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="finished run on a catalogue with titles"
    )
    parser.add_argument("--path", default="", help="where its catalogue is now, if it was moved")
    parser.add_argument(
        "--photos",
        type=int,
        default=0,
        help="at most so many of a split, spread over it (default: all)",
    )
    parser.add_argument(
        "--limits", nargs="+", type=float, default=[0.0], help="least similarities (default: 0)"
    )
    args = parser.parse_args()
    timing.print_machine()
    source = open_title_transfer(args.run, path=args.path)
    provenance = source.provenance
    timing.print_table(
        f"{source.catalog.name}: {len(source.titled):,} titles, run {provenance['run']}, data "
        f"{provenance['data_hash'][:12]}",
        HEADER,
        (
            cells
            for split in ("train", "test")
            for cells in rows(source, split, args.photos, args.limits)
        ),
    )


if __name__ == "__main__":
    main()
