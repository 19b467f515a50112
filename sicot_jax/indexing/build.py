"""`sicot index build`: a finished run and its catalogue's training photos -> the next version of an
index.

It grows in INDEX/.building, where a build that was stopped goes on, and becomes the version in use
when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sicot_jax._version import __version__
from sicot_jax.catalog.batches import PhotoBatchLoader, evenly_spaced
from sicot_jax.catalog.catalog import Catalog, ClassTable, Record, Split
from sicot_jax.catalog.open import open_catalog
from sicot_jax.catalog.prefetch import prefetch
from sicot_jax.catalog.sources.tables import read_class_table
from sicot_jax.classifier import imprint
from sicot_jax.common.files import file_sha256, read_json, write_json
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.export.from_run import Exported, exported, write_recognizer
from sicot_jax.index.storage import binary_codes as codebooks
from sicot_jax.index.storage import inverted_lists as lists
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as cards_of
from sicot_jax.index.storage.binary_codes import BinaryEncoder
from sicot_jax.index.storage.products import PICTURES, SHARPNESS, ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing import new_products as rows
from sicot_jax.indexing import title_regression as titles
from sicot_jax.indexing.calibrate import calibrate
from sicot_jax.indexing.verify import verify
from sicot_jax.parallel import mesh
from sicot_jax.search.category import write_fusion
from sicot_jax.search.ranker import read_ranker
from sicot_jax.search.ranking_features import image_sharpness
from sicot_jax.search.rejection import MIN_PHOTOS, write_calibration
from sicot_jax.training import device_batches
from sicot_jax.training import run as runs
from sicot_jax.weights import batch_norm_folding as folded
from sicot_jax.weights import bundle as folders

BITS = 256
_PIECE = 16  # batches between two commits
_LINES = 1 << 16  # codes made at a time


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is indexed. numbers: product of each class of the catalogue, int64 [classes]; below
    `known` they are the model's class ids. order: its training photos, by category and product.
    """

    catalog: Catalog
    table: ClassTable
    numbers: np.ndarray
    order: np.ndarray

    @property
    def known(self) -> int:
        return len(self.table)

    @property
    def owners(self) -> np.ndarray:
        return self.numbers[np.asarray(self.catalog.splits["train"].labels)[self.order]]


@dataclasses.dataclass(frozen=True)
class _Codes:
    """How they are made. learned: the run's own, for that kind alone."""

    kind: str
    bits: int
    learned: BinaryEncoder | None


def build(
    workdir: Path, index: Path, *, path: str = "", codes: str = codebooks.PCA, bits: int = BITS
) -> Path:
    """The folder of the new version. `path`: a catalogue folder in place of the run's own: it was
    moved, or has grown since.

    Products are matched to the model's classes by SKU; those that are new get rows of the
    classifier from their photos. Features of photos that the version in use has from the same model
    are taken from there. `codes`: how they are made, of `codebooks.KINDS`.
    InputError: an unfinished run, no photo, another process at work in `index`, "learned" of a run
      without such a layer.
    """
    codebooks.check_bits(bits)
    run = runs.read_run(workdir)
    run = runs.on_devices_here(run, runs.start_mesh(run.config), path)
    source = _source(run, open_catalog(run.config.data))
    with layout.write_lock(index, create=True):
        folder = index / layout.BUILDING
        with exported(workdir) as found:
            learned = _learned(found, bits, workdir) if codes == codebooks.LEARNED else None
            manifest = _build(folder, index, run, source, found, _Codes(codes, bits, learned))
        _calibrate(folder, source, manifest)
        _keep_ranker(index, folder, manifest)
        if faults := verify(folder):
            shutil.rmtree(folder)  # nothing of it can be gone on from
            raise InputError(f"{folder}: {faults[0]}; the version in use stays, build again")
        (folder / layout.PROGRESS).unlink()
        return layout.publish_version(index, folder)


def _learned(found: Exported, bits: int, workdir: Path) -> BinaryEncoder:
    if found.codes is None:
        raise InputError(
            f"{workdir}: trained without codes (loss.codes=0), wanted some for --codes learned; give another kind"
        )
    return codebooks.encoder_from_layer(*found.codes, bits=bits)


def _build(
    folder: Path, index: Path, run: runs.Run, source: _Source, found: Exported, codes: _Codes
) -> layout.IndexManifest:
    """All but the calibration, from where an earlier build was stopped; under the mesh of
    `exported`.
    """
    model = _begin(folder, found, source, codes)
    width, bits = found.classifier.kernel.shape[1], codes.bits
    vectors, cards = (
        VectorFiles(folder, width, bits),
        ProductStore(folder / layout.PRODUCTS, writable=True),
    )
    with contextlib.closing(cards):
        with contextlib.closing(_Seen(index, model)) as seen:
            embed_photos(found, run, source, seen, vectors, cards)
        _write_codes(folder, vectors, len(source.order), codes)
        lists.write_lists_if_large(folder, vectors, _ranges(source))
        _write_imprint(folder, vectors, source, found, cards)
        cards.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if importlib.util.find_spec("torch") and importlib.util.find_spec("onnxscript"):
        _write_graph(folder, found)
    manifest = layout.IndexManifest(
        model=model,
        run=run.workdir.absolute().name,
        trained=file_sha256(results) if (results := run.workdir / "results.json").exists() else "",
        data=source.catalog.data_hash,
        width=width,
        bits=bits,
        codes=codes.kind,
        photos=len(source.order),
        products=int((~source.catalog.classes.discontinued).sum()),
        categories=_ranges(source),
        sha256=layout.file_digests(folder),
        created=runs.now(),
        version=__version__,
    )
    layout.write_index_manifest(folder, manifest)
    return manifest


def _source(run: runs.Run, catalog: Catalog) -> _Source:
    table, classes = read_class_table(runs.class_table_file(run)), catalog.classes
    known = {sku: number for number, sku in enumerate(table.sku)}
    numbers, later = np.empty(len(classes), np.int64), len(known)
    for c in range(len(classes)):
        number = known.get(classes.sku[c])
        numbers[c] = later if number is None else number
        later += number is None
    labels = np.asarray(catalog.splits["train"].labels)
    category = np.unique(np.asarray(classes.category, str), return_inverse=True)[1]
    order = np.lexsort((np.arange(len(labels)), labels, category[labels]))
    order = order[~np.asarray(classes.discontinued, bool)[labels[order]]]
    if not len(order):
        raise InputError(
            f"{catalog.name}: no training photo of a product that is offered, wanted some to index"
        )
    return _Source(catalog, table, numbers, order)


def _calibrate(folder: Path, source: _Source, manifest: layout.IndexManifest) -> None:
    found = calibrate(folder, source.catalog.splits["validation"], source.numbers)
    if found is None:
        print(
            f'fewer than {MIN_PHOTOS} validation photos: nothing is called "unknown", no photo has a category; import with more',
            file=sys.stderr,
        )
        return
    calibration, fusion = found
    if calibration.reached < calibration.precision:
        print(
            f"no threshold makes {calibration.precision:.0%} of the answers right on {calibration.photos} validation "
            f"photos; taken is one at {calibration.reached:.0%}",
            file=sys.stderr,
        )
    write_calibration(folder / layout.REJECTION, calibration)
    write_fusion(folder / layout.CATEGORY_FUSION, fusion)
    fitted = {
        name: file_sha256(folder / name) for name in (layout.REJECTION, layout.CATEGORY_FUSION)
    }
    layout.write_index_manifest(
        folder, dataclasses.replace(manifest, sha256=manifest.sha256 | fitted)
    )


def _keep_ranker(index: Path, folder: Path, manifest: layout.IndexManifest) -> None:
    """That of the version in use, where it has learned the cosines of the same model."""
    try:
        path = layout.current_version(index) / layout.RANKER
        ranker = read_ranker(path)
    except InputError as error:
        if (index / layout.CURRENT).exists():
            print(f"similar products are not ranked: {error}", file=sys.stderr)
        return
    if ranker is not None and ranker.recognizer == manifest.model_sha256:
        shutil.copy(path, folder / layout.RANKER)
    elif ranker is not None:
        print(
            "the ranker is of another model: similar products are ranked after `sicot index rank`",
            file=sys.stderr,
        )


def _begin(folder: Path, found: Exported, source: _Source, codes: _Codes) -> str:
    """The recogniser, and the cards of all products without photos, unless a build of the same
    begins there; sha256 of its weights.
    """
    mark, written = folder / layout.PROGRESS, folder.with_name(f"{folder.name}.model")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    write_recognizer(written, found)
    folders.write_manifest(written, {})
    model = file_sha256(written / folders.WEIGHTS)
    written_by = {"format": layout.FORMAT, "version": __version__}
    same = {
        **written_by,
        "model": model,
        "data": source.catalog.data_hash,
        "codes": codes.kind,
        "bits": codes.bits,
    }
    if mark.exists():
        if read_json(mark, "what a build left behind") == same:
            shutil.rmtree(written)
            return model
        print(f"{folder}: of another model, catalogue or version; built anew", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    written.rename(folder / layout.MODEL)
    with contextlib.closing(ProductStore.create(folder / layout.PRODUCTS)) as cards:
        _put_products(source, cards, _quality_before(folder.parent))
    write_json(mark, same)
    return model


def _write_graph(folder: Path, found: Exported) -> None:
    from sicot_jax.export.to_onnx import write_onnx

    shutil.rmtree(folder / layout.ONNX_MODEL, ignore_errors=True)
    (folder / layout.ONNX_MODEL).mkdir()
    write_onnx(folder / layout.ONNX_MODEL, found)


def _ranges(source: _Source) -> dict[str, list[int]]:
    classes, labels = source.catalog.classes, np.asarray(source.catalog.splits["train"].labels)
    names, first = np.unique(
        np.asarray(classes.category, str)[labels[source.order]], return_index=True
    )
    ends = [*first[1:].tolist(), len(source.order)]
    return {
        str(name): [int(start), end] for name, start, end in zip(names, first, ends, strict=True)
    }


def _quality_before(index: Path) -> dict[str, dict[str, float]]:
    """SKU -> what the version in use was told of prices and the like, of which a catalogue says
    nothing.
    """
    try:
        with contextlib.closing(
            ProductStore(layout.current_version(index) / layout.PRODUCTS)
        ) as cards:
            rows = cards.connection.execute(
                "SELECT sku, quality FROM products WHERE quality <> '{}'"
            ).fetchall()
    except (InputError, sqlite3.Error):
        return {}  # there is none, or `_Seen` tells of it
    return {sku: cards_of.parse_quality(stored) for sku, stored in rows}


def _put_products(
    source: _Source, cards: ProductStore, quality: dict[str, dict[str, float]]
) -> None:
    """ProductStore of all products; what the model knows and the catalogue does not offer is there as
    withdrawn.
    """
    classes, table, gone = source.catalog.classes, source.table, np.ones(source.known, bool)
    gone[source.numbers[(source.numbers < source.known) & ~classes.discontinued]] = False
    withdrawn = np.flatnonzero(gone).tolist()
    with cards.change() as connection:
        cards_of.upsert_products(
            connection,
            ((c, table.sku[c], table.title[c], "", table.category[c], {}) for c in withdrawn),
        )
        connection.executemany(
            "UPDATE products SET withdrawn = 1 WHERE product = ?", ((c,) for c in withdrawn)
        )
        offered = np.flatnonzero(~classes.discontinued).tolist()
        cards_of.upsert_products(
            connection,
            (
                (
                    int(source.numbers[c]),
                    sku,
                    classes.title[c],
                    "",
                    classes.category[c],
                    quality.get(sku, {}),
                )
                for c, sku in zip(offered, (classes.sku[c] for c in offered), strict=True)
            ),
        )


class _Seen:
    """Features that the version in use has of photos, by the same model; none where it cannot be
    read.
    """

    def __init__(self, index: Path, model: str):
        self._cards: ProductStore | None = None
        cards = None
        try:
            folder = layout.current_version(index)
            manifest = layout.read_index_manifest(folder)
            if manifest.model_sha256 == model:
                cards = ProductStore(folder / layout.PRODUCTS)
                vectors = VectorFiles(folder, manifest.width, manifest.bits)
                self._features = vectors.memmap(layout.FEATURES, cards.ends()[0])
                self._cards = cards
        except (InputError, OSError, sqlite3.Error) as error:
            if (index / layout.CURRENT).exists():
                print(
                    f"the version in use cannot be read ({error}); all photos are embedded",
                    file=sys.stderr,
                )
        finally:
            if cards is not None and self._cards is None:
                cards.close()

    def photos(self, split: Split, indices: np.ndarray) -> dict[int, tuple[str, np.ndarray]]:
        """Row of `indices` -> image_id and feature, of the photos that are there."""
        if self._cards is None:
            return {}
        find = "SELECT place FROM photos WHERE image_id = ? AND place < ? LIMIT 1"
        found = {}
        for row, index in enumerate(indices.tolist()):
            image_id = split[index]["image_id"]
            place = self._cards.connection.execute(find, (image_id, len(self._features))).fetchone()
            if place is not None:
                found[row] = image_id, self._features[place[0]]
        return found

    def close(self) -> None:
        if self._cards is not None:
            self._cards.close()


def embed_photos(
    found: Exported,
    run: runs.Run,
    source: _Source,
    seen: _Seen,
    vectors: VectorFiles,
    cards: ProductStore,
) -> None:
    """Features, owners and photos from where an earlier build stopped, in pieces of one commit
    each.
    """
    split, owners = source.catalog.splits["train"], source.owners
    starts = np.flatnonzero(
        np.r_[True, np.diff(owners) != 0]
    )  # a product's photos follow each other
    rank = np.arange(len(owners)) - np.repeat(starts, np.diff(np.r_[starts, len(owners)]))
    done, size = cards.state(vectors.width).places, run.config.eval.batch_size
    with (
        tqdm(
            total=len(owners),
            initial=done,
            unit="photo",
            desc="embedding",
            file=sys.stderr,
            mininterval=1,
        ) as bar,
        embedder(found) as embed,
    ):
        while done < len(owners):
            end = min(done + size * _PIECE, len(owners))
            photos = seen.photos(split, source.order[done:end])
            new = np.array([row for row in range(end - done) if row not in photos], np.int64)
            batches = PhotoBatchLoader(
                split, run.config.preprocessing, size, source.order[done + new]
            )
            prefetched = prefetch(
                batches,
                0,
                len(batches),
                workers=run.config.data.workers,
                source=run.config.data.source,
            )
            photos |= zip(new.tolist(), embed(prefetched), strict=True)
            ids, features = zip(*(photos[row] for row in range(end - done)), strict=True)
            vectors.write(layout.FEATURES, done, np.stack(features))
            vectors.write(layout.ROW_PRODUCTS, done, owners[done:end])
            with cards.change() as connection:
                _put_photos(connection, source, ids, done, owners, rank)
                cards_of.set_num_rows(connection, end)
            bar.update(end - done)
            done = end


def _put_photos(
    connection: Any,
    source: _Source,
    ids: Sequence[str],
    done: int,
    owners: np.ndarray,
    rank: np.ndarray,
) -> None:
    split = source.catalog.splits["train"]
    for place, image_id in enumerate(ids, done):
        jpeg = None
        if rank[place] < PICTURES:
            record = split[int(source.order[place])]
            jpeg, owner = _jpeg(record), int(owners[place])
            if rank[place] == 0:
                cards_of.merge_quality(connection, owner, {SHARPNESS: image_sharpness(jpeg)})
            if rank[place] == 0 and record["tags"]:
                connection.execute(
                    "UPDATE products SET tags = ? WHERE product = ?", (record["tags"], owner)
                )
        cards_of.insert_photos(connection, [(place, int(owners[place]), image_id, jpeg)])


def _jpeg(record: Record) -> bytes:
    from PIL import Image

    from sicot_jax.common import image

    stored = record["image"]
    return stored if isinstance(stored, bytes) else image.encode_jpeg(Image.fromarray(stored))


@contextlib.contextmanager
def embedder(
    found: Exported,
) -> Iterator[Callable[[Iterator[dict[str, Any]]], Iterator[tuple[str, np.ndarray]]]]:
    """Batches of photos -> image_id and unit feature float16 [D], one by one; each batch over all
    devices, fetched one batch late.
    """
    devices = mesh.make_mesh()
    with jax.set_mesh(devices):
        weights = mesh.replicate_tree(folded.fold(found.arrays), devices)

        @jax.jit
        def compute(weights, image):
            image = found.preprocessing.normalise(found.preprocessing.centre_crop(image))
            return mesh.replicate(folded.embed(found.model, weights, image))

        def embed(batches: Iterator[dict[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
            pending: tuple[Any, dict[str, Any]] | None = None
            for batch in batches:
                result = compute(weights, device_batches.to_device(batch, devices)["image"])
                if pending is not None:
                    yield from _features(*pending)
                pending = result, batch
            if pending is not None:
                yield from _features(*pending)

        yield embed


def _features(embedding: Any, batch: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    real = batch["label"] >= 0
    return zip(
        batch["image_id"][real],
        l2_normalize(np.asarray(embedding)[real]).astype(np.float16),
        strict=True,
    )


def _write_codes(folder: Path, vectors: VectorFiles, places: int, codes: _Codes) -> None:
    features = vectors.memmap(layout.FEATURES, places)
    codebook = codes.learned or codebooks.fit_binary_encoder(features, codes.bits, codes.kind)
    codebook.save(folder / layout.BINARY_ENCODER)
    vectors.write(layout.CODES, 0, np.zeros((0, codes.bits // 8), np.uint8))
    for first in range(0, places, _LINES):
        vectors.write(layout.CODES, first, codebook.encode(features[first : first + _LINES]))


def _write_imprint(
    folder: Path, vectors: VectorFiles, source: _Source, found: Exported, cards: ProductStore
) -> None:
    """What rows of later products are made with, from known ones; and the rows of those that are
    here already.
    """
    import safetensors

    owners = source.owners
    features = vectors.memmap(layout.FEATURES, len(owners))

    def means(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        photos = imprint.first_photos(owners, products)
        return imprint.mean_directions(features[photos], owners[photos])

    products = np.unique(owners)
    known = products[products < source.known]
    known, directions = means(known[evenly_spaced(len(known), imprint.KNOWN)])
    with safetensors.safe_open(folder / layout.MODEL / folders.WEIGHTS, framework="numpy") as file:
        kernel, bias = file.get_slice("fc.weight"), file.get_slice("fc.bias")
        own = np.array([kernel[int(c) : int(c) + 1][0] for c in known]).reshape(
            len(known), vectors.width
        )
        mean_row, mean_bias = np.zeros(vectors.width), 0.0
        for first in range(0, source.known, _LINES):
            part = slice(first, min(first + _LINES, source.known))
            mean_row += kernel[part].sum(0, dtype=np.float64) / source.known
            mean_bias += float(bias[part].sum(dtype=np.float64)) / source.known
    made_with = imprint.fit(directions, own, mean_row.astype(np.float32), mean_bias)
    imprint.save(folder / layout.IMPRINT, made_with)
    products = products[products < source.known]
    some, directions = means(products[evenly_spaced(len(products), titles.KNOWN)])
    named = [
        (card.title, card.category) if card else ("", "") for card in cards.products(some.tolist())
    ]
    counts = np.bincount(owners)[some]
    titles.save(
        folder / layout.TITLE_REGRESSION, titles.fit(named, directions - made_with.centre, counts)
    )
    rows.put_all(cards, vectors, rows.load(folder), source.known)
