"""How like the true title a borrowed one is: photos whose title is known are lent another, by the
photo alone.

Command:  python -m benchmarks.title_transfer --run runs/fashion/co_training
Smaller:  add --photos 1000
Table:    "train" photos take part in the run's training and are each left out of the search; "test"
  photos are new to it,
          as those of another catalogue are. "random" lends the title of any other training photo,
          the same number of them. Recall is the share of the true title's known words that the
          borrowed title has, precision the share of its known words that the true title has; means
          over photos whose true, or borrowed, title has a known word.
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
    """(image_id, photo) of some records of a split, one at a time."""

    def __init__(self, split: Split, indices: np.ndarray):
        self.split, self.indices = split, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        record = self.split[int(self.indices[index])]
        return record["image_id"], record["image"]


def agreement(true: Record, lent: Record) -> tuple[float, float, bool]:
    """(recall, precision) of known words, NaN where there are none to look for, and whether the
    class is the same.
    """
    wanted, got = set(true["token_ids"].tolist()), set(lent["token_ids"].tolist())
    both = len(wanted & got)
    recall = both / len(wanted) if wanted else np.nan
    return recall, both / len(got) if got else np.nan, true["class_id"] == lent["class_id"]


def row(
    source: TitleTransfer, true: Sequence[Record], places: np.ndarray, name: str, similarity: str
) -> tuple[str, ...]:
    """`places` [Q] in the source's photos with a title, -1 where nothing is lent."""
    train = source.catalog.splits["train"]
    found = [
        agreement(record, train[int(source.titled[place])])
        for record, place in zip(true, places, strict=True)
        if place >= 0
    ]
    shares = np.nanmean(np.array(found, float).reshape(-1, 3), 0) if found else np.full(3, np.nan)
    filled = 100 * len(found) / len(true)
    return (
        name,
        f"{len(true):,}",
        f"{filled:.1f} %",
        *(f"{100 * share:.1f} %" for share in shares),
        similarity,
    )


def rows(
    source: TitleTransfer, split_name: str, most: int, limits: Sequence[float]
) -> Iterator[tuple[str, ...]]:
    """The nearest photo's title by each limit of similarity, then any photo's."""
    split = source.catalog.splits[split_name]
    titled = np.flatnonzero([bool(split[i]["title"].strip()) for i in range(len(split))])
    if not len(titled):
        yield split_name, "no photo with a title"
        return
    count = min(most, len(titled)) if most else len(titled)
    indices = titled[np.arange(count) * len(titled) // count]
    true = [Record({**split[int(i)], "image": b""}) for i in indices]
    places, similarity = source.nearest_titled(_Photos(split, indices))
    for limit in limits:
        taken = np.where(similarity >= limit, places, -1)
        middle = f"{np.median(similarity[taken >= 0]):.3f}" if (taken >= 0).any() else ""
        yield row(
            source,
            true,
            taken,
            f"{split_name}, nearest" + (f" from {limit:g}" if limit else ""),
            middle,
        )
    # Any photo but itself: a step of 1 to N - 1 from its own place.
    total = len(source.titled)
    own = np.searchsorted(source.titled, indices) if split_name == "train" else np.zeros(count, int)
    steps = np.random.default_rng(0).integers(1, max(total, 2), count)
    yield row(source, true, (own + steps) % total, f"{split_name}, random", "")


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
        f"{source.catalog.name}: {len(source.titled):,} titles to lend, run {provenance['run']}, data {provenance['data_hash'][:12]}",
        HEADER,
        (
            cells
            for split in ("train", "test")
            for cells in rows(source, split, args.photos, args.limits)
        ),
    )


if __name__ == "__main__":
    main()
