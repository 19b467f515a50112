"""What an import read, kept and dropped, and why: `report.json` in full, `report.md` to read."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.catalog import SPLITS, ClassTable
from sicot_jax.catalog.importing.manifest_rows import DroppedRow
from sicot_jax.catalog.importing.splits import Assignment
from sicot_jax.catalog.importing.title_source import Borrowed
from sicot_jax.catalog.sources.lazy_strings import counted

# Rows left out on purpose, or with a borrowed title, can be most of a source; bad rows are few and
# all named.
_NAMED_ON_PURPOSE = 100
_NAMED_IN_TEXT = 20
_NAMED_IN_SUMMARY = 3


@dataclasses.dataclass(frozen=True)
class BorrowedTitles:
    """Training photos that had no title, and what they were lent; `rows` names photo, title and
    cosine of the first.
    """

    run: str
    data_hash: str
    commit: str
    without: int
    borrowed: int
    share: float | None  # borrowed / without
    min_similarity: float
    median_similarity: float | None  # of those borrowed
    rows: Sequence[str]

    @classmethod
    def of(
        cls,
        about: Mapping[str, str],
        *,
        without: int,
        min_similarity: float,
        taken: Sequence[tuple[str, Borrowed]],
    ) -> BorrowedTitles:
        """`about` as of a TitleLender, `taken` photos by their place in the source, each with what
        it was lent.
        """
        named = [
            f"{image}: {one.title} (borrowed from photo {one.image_id}, similarity {one.similarity:.3f})"
            for image, one in taken[:_NAMED_ON_PURPOSE]
        ]
        return cls(
            **about,
            without=without,
            borrowed=len(taken),
            share=len(taken) / without if without else None,
            min_similarity=min_similarity,
            median_similarity=float(np.median([one.similarity for _, one in taken]))
            if taken
            else None,
            rows=named,
        )

    def __str__(self) -> str:
        if not self.without:
            return "borrowed titles: none, every train photo has its own"
        middle = (
            ""
            if self.median_similarity is None
            else f", median similarity {self.median_similarity:.3f}"
        )
        commit = f", commit {self.commit[:12]}" if self.commit else ""
        return (
            f"borrowed titles: {self.borrowed} of {counted(self.without, 'train photo')} without one ({self.share:.1%}), "
            f"from the nearest photos of run {self.run} (data {self.data_hash[:12]}{commit}){middle}"
        )


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """Counts and names; `dropped` maps a reason to {"bad", "count", "rows"}, the lists below name
    SKUs or photos.
    """

    name: str
    version: str
    source: str
    read: int
    kept: int
    photos: Mapping[str, int]
    classes: int
    withdrawn: int
    previous_skus: int | None  # SKUs with photos in the version before; None for a first import
    new_skus: int  # with photos now and not in the version before
    newly_withdrawn: int  # with photos in the version before and not now
    settled: int  # photos that keep the split of an earlier version
    unused_columns: Sequence[str]  # each with the column it may be a misspelling of
    first_bad: Sequence[str]
    dropped: Mapping[str, Mapping[str, Any]]
    conflicting: Sequence[Mapping[str, Any]]  # identical photos under several SKUs: in train only
    surplus_copies: int
    surplus: Sequence[str]
    tail_cut: int
    small_classes: Sequence[str]  # under 4 photos: trained, not tested
    untested_classes: Sequence[str]  # 4 photos or more, but not enough for a test set
    uneven_classes: Sequence[str]  # tested with another number of photos than --test-per-class
    classes_without_train: Sequence[str]
    photos_without_words: int
    vocabulary: int
    head_boundary: int
    head_classes: int
    head_train_photos: int
    shared_words: Mapping[str, float]
    borrowed_titles: BorrowedTitles | None = None

    @classmethod
    def of(
        cls,
        *,
        name: str,
        version: str,
        source: str,
        unused_columns: Sequence[str],
        dropped: Sequence[DroppedRow],
        assignment: Assignment,
        references: Sequence[str],
        skus: Sequence[str],
        table: ClassTable,
        previous: ClassTable | None,
        head_boundary: int,
        head: np.ndarray,
        vocabulary: int,
        shared_words: Mapping[str, float],
        without_words: int,
        borrowed_titles: BorrowedTitles | None = None,
    ) -> ImportReport:
        """`references` and `skus` name the decoded photos that `assignment` speaks of by index."""
        reasons: defaultdict[str, list[DroppedRow]] = defaultdict(list)
        for drop in dropped:
            reasons[drop.reason].append(drop)
        counts = table.counts
        train = counts["train"]
        now, before = _sold(table), _sold(previous) if previous else set()
        return cls(
            name=name,
            version=version,
            source=source,
            read=len(dropped) + len(references),
            kept=int(sum(counts[split].sum() for split in SPLITS)),
            photos={split: int(counts[split].sum()) for split in SPLITS},
            classes=len(table),
            withdrawn=int(table.withdrawn.sum()),
            previous_skus=len(before) if previous else None,
            new_skus=len(now - before),
            newly_withdrawn=len(before - now),
            settled=assignment.settled,
            unused_columns=unused_columns,
            first_bad=[str(drop) for drop in dropped if drop.bad][:_NAMED_IN_SUMMARY],
            dropped={reason: _named(drops) for reason, drops in sorted(reasons.items())},
            conflicting=[
                {
                    "image_id": image_id,
                    "photos": [{"image": references[i], "sku": skus[i]} for i in group],
                }
                for image_id, group in assignment.conflicting
            ],
            surplus_copies=len(assignment.surplus),
            surplus=[references[i] for i in assignment.surplus],
            tail_cut=len(assignment.cut),
            small_classes=[str(label) for label in assignment.small_classes],
            untested_classes=[str(label) for label in assignment.untested_classes],
            uneven_classes=[str(label) for label in assignment.uneven_classes],
            classes_without_train=[
                table.sku[int(c)] for c in np.flatnonzero((train == 0) & ~table.withdrawn)
            ],
            photos_without_words=without_words,
            vocabulary=vocabulary,
            head_boundary=head_boundary,
            head_classes=int(head.sum()),
            head_train_photos=int(train[head].sum()),
            shared_words=shared_words,
            borrowed_titles=borrowed_titles,
        )

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.md`."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")

    def summary(self) -> str:
        """A few lines for the terminal."""
        tail = self.classes - self.withdrawn - self.head_classes
        dropped = ", ".join(f"{entry['count']} {reason}" for reason, entry in self.dropped.items())
        lines = [
            f"{self.name} {self.version}: {counted(self.read, 'row')} read, {counted(self.kept, 'photo')} kept in "
            f"{counted(self.classes, 'class')}",
            "photos: " + ", ".join(f"{split} {count}" for split, count in self.photos.items()),
            f"head: {counted(self.head_classes, 'class')} with more than {counted(self.head_boundary, 'train photo')}, "
            f"{self.head_train_photos} of {counted(self.photos['train'], 'train photo')}; "
            f"tail: {counted(tail, 'class')}",
            f"words: {self.vocabulary}, {self.shared_words['share']:.1%} shared by head and tail; "
            f"{counted(self.photos_without_words, 'train photo')} without a known word",
            f"dropped: {dropped or 'none'}",
            *(f"bad row: {row}" for row in self.first_bad),
            f"identical photos: {self.surplus_copies} surplus dropped, "
            f"{len(self.conflicting)} under several SKUs (train only)",
        ]
        if self.borrowed_titles:
            lines.append(str(self.borrowed_titles))
        if self.unused_columns:
            lines.append(f"unused columns: {', '.join(self.unused_columns)}")
        if self.tail_cut:
            lines.append(f"tail cut: {counted(self.tail_cut, 'train photo')} removed")
        if self.withdrawn:
            lines.append(
                f"withdrawn: {counted(self.withdrawn, 'SKU')} of earlier versions without a photo now"
            )
        for text, skus in self._named_classes():
            if skus:
                lines.append(f"{text}: {counted(len(skus), 'class')}")
        if self.previous_skus is not None:
            lines.append(
                f"version {self.version} of {self.name}: {counted(self.new_skus, 'new SKU')}, "
                f"{self.newly_withdrawn} withdrawn; {self.settled} of {counted(self.kept, 'photo')} keep the split of an "
                "earlier version"
            )
        return "\n".join(lines + [f"WARNING: {line}" for line in self._warnings()])

    def _warnings(self) -> list[str]:
        lines = []
        if self.previous_skus and 2 * self.newly_withdrawn > self.previous_skus:
            lines.append(
                f"{self.newly_withdrawn} of {counted(self.previous_skus, 'SKU')} withdrawn, more than half; "
                "if this source is another catalogue, import it with another --out"
            )
        for split in ("test", "validation"):
            if not self.photos[split]:
                small = len(self.small_classes) == self.classes - self.withdrawn
                why = (
                    "every class has under 4 photos"
                    if small
                    else f"no class has enough, no row has split {split}"
                )
                lines.append(f"no {split} photos: {why}; give a `split` column or more photos")
        return lines

    def _named_classes(self) -> list[tuple[str, Sequence[str]]]:
        return [
            ("under 4 photos, trained but not tested", self.small_classes),
            ("not enough photos for the asked test set, not tested", self.untested_classes),
            ("tested with another number of photos than --test-per-class", self.uneven_classes),
            ("without a train photo, cannot be learned", self.classes_without_train),
        ]

    def markdown(self) -> str:
        """The report as a page."""
        parts = [
            f"# Import of {self.source}\n",
            *(f"- {line}" for line in self.summary().splitlines()),
        ]
        for reason, entry in self.dropped.items():
            kind = "bad" if entry["bad"] else "left out on purpose"
            parts += [
                f"\n## Dropped: {reason} ({entry['count']}, {kind})\n",
                *_bullets(entry["rows"], entry["count"]),
            ]
        if self.conflicting:
            lines = [
                ", ".join(f"`{photo['image']}` ({photo['sku']})" for photo in group["photos"])
                for group in self.conflicting
            ]
            parts += [
                f"\n## Identical photos under several SKUs ({len(lines)})\n",
                *_bullets(lines, len(lines)),
            ]
        if self.surplus:
            parts += [f"\n## Surplus identical copies ({len(self.surplus)})\n"]
            parts += _bullets(self.surplus, len(self.surplus))
        if self.borrowed_titles and self.borrowed_titles.rows:
            borrowed = self.borrowed_titles
            parts += [
                f"\n## Borrowed titles ({borrowed.borrowed})\n",
                *_bullets(borrowed.rows, borrowed.borrowed),
            ]
        for text, skus in self._named_classes():
            if skus:
                parts += [f"\n## Classes {text} ({len(skus)})\n", *_bullets(skus, len(skus))]
        return "\n".join(parts) + "\n"


def _sold(table: ClassTable) -> set[str]:
    return {sku for sku, withdrawn in zip(table.sku, table.withdrawn, strict=True) if not withdrawn}


def _named(drops: Sequence[DroppedRow]) -> dict[str, Any]:
    bad = any(drop.bad for drop in drops)
    shown = drops if bad else drops[:_NAMED_ON_PURPOSE]
    rows = [drop.row + (f": {drop.detail}" if drop.detail else "") for drop in shown]
    return {"bad": bad, "count": len(drops), "rows": rows}


def _bullets(lines: Sequence[str], count: int) -> list[str]:
    shown = [f"- {' '.join(line.split())}" for line in lines[:_NAMED_IN_TEXT]]
    if count > len(shown):
        shown.append(f"- and {count - len(shown)} more, see report.json")
    return shown
