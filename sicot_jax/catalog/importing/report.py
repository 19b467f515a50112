"""Reports what an import read, kept and dropped, and why: `report.json` in full, `report.md`."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sicot_jax.catalog.catalog import SPLITS, ClassTable
from sicot_jax.catalog.importing.catalog_tables import CatalogTables
from sicot_jax.catalog.importing.manifest_rows import DroppedRow, SourceNotes
from sicot_jax.catalog.importing.settings import TransferredTitle
from sicot_jax.catalog.importing.splits import SplitAssignment
from sicot_jax.catalog.importing.spool import StoredPhoto
from sicot_jax.catalog.statistics import default_head_boundary, head_mask, vocabulary_overlap
from sicot_jax.common.text import pluralize

# Rows left out on purpose, or with a transferred title, can be most of a source; bad rows are few
# and all named.
_MAX_LISTED = 100
_MAX_LISTED_IN_PAGE = 20
_MAX_LISTED_IN_SUMMARY = 3


@dataclasses.dataclass(frozen=True)
class TitleTransferReport:
    """Training photos that had no title, and the titles they were given.

    Attributes:
      run: name of the run folder whose embeddings were compared.
      data_hash: data hash of the catalogue the titles come from.
      commit: commit of the run.
      photos_without_title: training photos without a title.
      transferred: photos that were given a title.
      share: transferred / photos_without_title; None without such photos.
      min_similarity: minimum cosine similarity of a transferred title.
      median_similarity: median cosine similarity of the transferred titles; None without any.
      rows: photo, title and similarity of the first ones.
    """

    run: str
    data_hash: str
    commit: str
    photos_without_title: int
    transferred: int
    share: float | None
    min_similarity: float
    median_similarity: float | None
    rows: Sequence[str]

    @classmethod
    def create(
        cls,
        provenance: Mapping[str, str],
        *,
        photos_without_title: int,
        min_similarity: float,
        transferred: Sequence[tuple[str, TransferredTitle]],
    ) -> TitleTransferReport:
        """Returns the report of a title transfer.

        Args:
          provenance: `TitleSource.provenance`.
          photos_without_title: training photos without a title.
          min_similarity: minimum cosine similarity.
          transferred: path of each photo that was given a title, and the title.

        Returns:
          The report.
        """
        similarities = [match.similarity for _, match in transferred]
        return cls(
            **provenance,
            photos_without_title=photos_without_title,
            transferred=len(transferred),
            share=len(transferred) / photos_without_title if photos_without_title else None,
            min_similarity=min_similarity,
            median_similarity=float(np.median(similarities)) if similarities else None,
            rows=[
                f"{image}: {match.title} (from photo {match.image_id}, "
                f"similarity {match.similarity:.3f})"
                for image, match in transferred[:_MAX_LISTED]
            ],
        )

    def __str__(self) -> str:
        if not self.photos_without_title:
            return "transferred titles: none, every train photo has a title"
        median = self.median_similarity
        middle = "" if median is None else f", median similarity {median:.3f}"
        commit = f", commit {self.commit[:12]}" if self.commit else ""
        return (
            f"transferred titles: {self.transferred} of "
            f"{pluralize(self.photos_without_title, 'train photo')} without one "
            f"({self.share:.1%}), from the nearest photos of run {self.run} "
            f"(data {self.data_hash[:12]}{commit}){middle}"
        )


@dataclasses.dataclass(frozen=True)
class ReportInputs:
    """What an import report is made from.

    Attributes:
      name: name of the catalogue.
      version: version of the catalogue.
      source: file or folder name of the source.
      notes: what the reader of the source has to say.
      dropped: rows that were not imported.
      assignment: split of every decoded photo.
      photos: the decoded photos, as `assignment` numbers them.
      tables: classes, labels and vocabulary.
      previous: class table of the previous version.
      title_transfer: report of transferred titles.
    """

    name: str
    version: str
    source: str
    notes: SourceNotes
    dropped: Sequence[DroppedRow]
    assignment: SplitAssignment
    photos: Sequence[StoredPhoto]
    tables: CatalogTables
    previous: ClassTable | None
    title_transfer: TitleTransferReport | None = None


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """Counts and names of an import.

    Attributes:
      name: name of the catalogue.
      version: version of the catalogue.
      source: file or folder name of the source.
      read: rows read.
      kept: photos kept.
      photos: split -> number of photos.
      classes: number of classes, discontinued ones included.
      discontinued: number of classes without a photo now.
      previous_skus: SKUs with photos in the previous version; None for a first import.
      new_skus: SKUs with photos now and not in the previous version.
      newly_discontinued: SKUs with photos in the previous version and not now.
      unchanged_splits: photos that keep the split of the previous version.
      remarks: lines on ignored columns and on texts that were changed.
      doubtful_skus: a warning for each kind of doubtful SKUs.
      first_bad: the first bad rows.
      dropped: reason -> {"bad": bool, "count": int, "rows": names}.
      conflicting: identical photos under several SKUs, which are in train only.
      near_copies: near-identical photos of one SKU, but for one of each picture.
      divided: near-identical photos that are trained on and tested with.
      surplus_copies: number of identical photos dropped.
      surplus: paths of these photos.
      tail_cut: train photos removed by `--tail-cut`.
      small_classes: SKUs with fewer than 4 photos: trained, not tested.
      untested_classes: SKUs with 4 photos or more, but not enough for a test set.
      uneven_classes: SKUs tested with another number of photos than `--test-per-class`.
      classes_without_train: SKUs that cannot be learned.
      photos_without_words: train photos without a known word.
      vocabulary: number of words.
      head_boundary: a class with more train photos is a head class.
      head_classes: number of head classes.
      head_train_photos: train photos of head classes.
      shared_words: words shared by head and tail, see `vocabulary_overlap`.
      title_transfer: report of transferred titles.
    """

    name: str
    version: str
    source: str
    read: int
    kept: int
    photos: Mapping[str, int]
    classes: int
    discontinued: int
    previous_skus: int | None
    new_skus: int
    newly_discontinued: int
    unchanged_splits: int
    remarks: Sequence[str]
    doubtful_skus: Sequence[str]
    first_bad: Sequence[str]
    dropped: Mapping[str, Mapping[str, Any]]
    conflicting: Sequence[Mapping[str, Any]]
    near_copies: int
    divided: Sequence[Sequence[str]]
    surplus_copies: int
    surplus: Sequence[str]
    tail_cut: int
    small_classes: Sequence[str]
    untested_classes: Sequence[str]
    uneven_classes: Sequence[str]
    classes_without_train: Sequence[str]
    photos_without_words: int
    vocabulary: int
    head_boundary: int
    head_classes: int
    head_train_photos: int
    shared_words: Mapping[str, float]
    title_transfer: TitleTransferReport | None = None

    @classmethod
    def create(cls, inputs: ReportInputs) -> ImportReport:
        """Returns the report of an import.

        Args:
          inputs: rows, photos, splits and tables of the import.

        Returns:
          The report.
        """
        table, assignment, photos = inputs.tables.classes, inputs.assignment, inputs.photos
        counts, token_ids = table.counts, inputs.tables.train_token_ids
        train = counts["train"]
        now, before = _available(table), _available(inputs.previous)
        boundary = default_head_boundary(train)
        head = head_mask(train, boundary)
        return cls(
            name=inputs.name,
            version=inputs.version,
            source=inputs.source,
            read=len(inputs.dropped) + len(photos),
            kept=int(sum(counts[split].sum() for split in SPLITS)),
            photos={split: int(counts[split].sum()) for split in SPLITS},
            classes=len(table),
            discontinued=int(table.discontinued.sum()),
            previous_skus=len(before) if inputs.previous else None,
            new_skus=len(now - before),
            newly_discontinued=len(before - now),
            unchanged_splits=assignment.unchanged,
            remarks=inputs.notes.remarks(),
            doubtful_skus=inputs.notes.warnings(),
            first_bad=[str(drop) for drop in inputs.dropped if drop.bad][:_MAX_LISTED_IN_SUMMARY],
            dropped=_by_reason(inputs.dropped),
            conflicting=[
                {
                    "image_id": image_id,
                    "photos": [
                        {"image": photos[i].row.image, "sku": photos[i].row.sku} for i in group
                    ],
                }
                for image_id, group in assignment.conflicting
            ],
            near_copies=assignment.near_copies,
            divided=[[photos[i].row.image for i in group] for group in assignment.divided],
            surplus_copies=len(assignment.surplus),
            surplus=[photos[i].row.image for i in assignment.surplus],
            tail_cut=len(assignment.tail_removed),
            small_classes=[str(label) for label in assignment.small_classes],
            untested_classes=[str(label) for label in assignment.untested_classes],
            uneven_classes=[str(label) for label in assignment.uneven_classes],
            classes_without_train=[
                table.sku[int(c)] for c in np.flatnonzero((train == 0) & ~table.discontinued)
            ],
            photos_without_words=sum(len(ids) == 0 for ids in token_ids),
            vocabulary=len(inputs.tables.tokenizer.vocabulary) - 1,
            head_boundary=boundary,
            head_classes=int(head.sum()),
            head_train_photos=int(train[head].sum()),
            shared_words=vocabulary_overlap(token_ids, inputs.tables.labels["train"], head),
            title_transfer=inputs.title_transfer,
        )

    def write(self, folder: Path) -> None:
        """Writes `report.json` and `report.md`.

        Args:
          folder: version folder.
        """
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        # A file name or text that is no Unicode must not end an import after its photos.
        for name, content in (("report.json", text + "\n"), ("report.md", self.markdown())):
            (folder / name).write_text(content, encoding="utf-8", errors="backslashreplace")

    def summary(self) -> str:
        """Returns a few lines for the terminal."""
        tail = self.classes - self.discontinued - self.head_classes
        dropped = ", ".join(f"{entry['count']} {reason}" for reason, entry in self.dropped.items())
        lines = [
            f"{self.name} {self.version}: {pluralize(self.read, 'row')} read, "
            f"{pluralize(self.kept, 'photo')} kept in {pluralize(self.classes, 'class')}",
            "photos: " + ", ".join(f"{split} {count}" for split, count in self.photos.items()),
            f"head: {pluralize(self.head_classes, 'class')} with more than "
            f"{pluralize(self.head_boundary, 'train photo')}, "
            f"{self.head_train_photos} of {pluralize(self.photos['train'], 'train photo')}; "
            f"tail: {pluralize(tail, 'class')}",
            f"words: {self.vocabulary}, {self.shared_words['share']:.1%} shared by head and tail; "
            f"{pluralize(self.photos_without_words, 'train photo')} without a known word",
            f"dropped: {dropped or 'none'}",
            *(f"bad row: {row}" for row in self.first_bad),
            f"identical photos: {self.surplus_copies} surplus dropped, "
            f"{len(self.conflicting)} under several SKUs (train only)",
        ]
        if self.near_copies:
            lines.append(
                f"near-identical photos: {self.near_copies} of a picture that came before, "
                "kept in its split"
            )
        if self.title_transfer:
            lines.append(str(self.title_transfer))
        lines += self.remarks
        if self.tail_cut:
            lines.append(f"tail cut: {pluralize(self.tail_cut, 'train photo')} removed")
        if self.discontinued:
            lines.append(
                f"discontinued: {pluralize(self.discontinued, 'SKU')} of earlier versions "
                "without a photo now"
            )
        for text, skus in self._listed_classes():
            if skus:
                lines.append(f"{text}: {pluralize(len(skus), 'class')}")
        if self.previous_skus is not None:
            lines.append(
                f"version {self.version} of {self.name}: {pluralize(self.new_skus, 'new SKU')}, "
                f"{self.newly_discontinued} discontinued; {self.unchanged_splits} of "
                f"{pluralize(self.kept, 'photo')} keep the split of an earlier version"
            )
        return "\n".join(lines + [f"WARNING: {line}" for line in self._warnings()])

    def _warnings(self) -> list[str]:
        lines = list(self.doubtful_skus)
        if self.previous_skus and 2 * self.newly_discontinued > self.previous_skus:
            lines.append(
                f"{self.newly_discontinued} of {pluralize(self.previous_skus, 'SKU')} "
                "discontinued, more than half; if this source is another catalogue, "
                "import it with another --out"
            )
        if self.divided:
            lines.append(
                f"near-identical photos in several splits: {len(self.divided)} pictures "
                f"({', '.join(self.divided[0][:2])}), by the source or an earlier version; "
                "the accuracy measured with them is too high"
            )
        for split in ("test", "validation"):
            if not self.photos[split]:
                small = len(self.small_classes) == self.classes - self.discontinued
                why = (
                    "every class has under 4 photos"
                    if small
                    else f"no class has enough, no row has split {split}"
                )
                lines.append(f"no {split} photos: {why}; give a `split` column or more photos")
        return lines

    def _listed_classes(self) -> list[tuple[str, Sequence[str]]]:
        return [
            ("under 4 photos, trained but not tested", self.small_classes),
            ("not enough photos for the asked test set, not tested", self.untested_classes),
            ("tested with another number of photos than --test-per-class", self.uneven_classes),
            ("without a train photo, cannot be learned", self.classes_without_train),
        ]

    def markdown(self) -> str:
        """Returns the report as a Markdown page."""
        parts = [
            f"# Import of {self.source}\n",
            *(f"- {line}" for line in self.summary().splitlines()),
        ]
        for reason, entry in self.dropped.items():
            kind = "bad" if entry["bad"] else "left out"
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
        if self.divided:
            lines = [", ".join(f"`{image}`" for image in group) for group in self.divided]
            parts += [f"\n## Near-identical photos in several splits ({len(lines)})\n"]
            parts += _bullets(lines, len(lines))
        if self.title_transfer and self.title_transfer.rows:
            transfer = self.title_transfer
            parts += [
                f"\n## Transferred titles ({transfer.transferred})\n",
                *_bullets(transfer.rows, transfer.transferred),
            ]
        for text, skus in self._listed_classes():
            if skus:
                parts += [f"\n## Classes {text} ({len(skus)})\n", *_bullets(skus, len(skus))]
        return "\n".join(parts) + "\n"


def _available(table: ClassTable | None) -> set[str]:
    """Returns the SKUs that have photos."""
    if table is None:
        return set()
    return {
        sku
        for sku, discontinued in zip(table.sku, table.discontinued, strict=True)
        if not discontinued
    }


def _by_reason(dropped: Sequence[DroppedRow]) -> dict[str, dict[str, Any]]:
    reasons: defaultdict[str, list[DroppedRow]] = defaultdict(list)
    for drop in dropped:
        reasons[drop.reason].append(drop)
    return {reason: _reason_entry(drops) for reason, drops in sorted(reasons.items())}


def _reason_entry(drops: Sequence[DroppedRow]) -> dict[str, Any]:
    bad = any(drop.bad for drop in drops)
    shown = drops if bad else drops[:_MAX_LISTED]
    rows = [drop.row + (f": {drop.detail}" if drop.detail else "") for drop in shown]
    return {"bad": bad, "count": len(drops), "rows": rows}


def _bullets(lines: Sequence[str], count: int) -> list[str]:
    shown = [f"- {' '.join(line.split())}" for line in lines[:_MAX_LISTED_IN_PAGE]]
    if count > len(shown):
        shown.append(f"- and {count - len(shown)} more, see report.json")
    return shown
