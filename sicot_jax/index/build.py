"""`sicot index build`: a finished run and its catalogue's training photos -> the next version of an index.

It grows in INDEX/.building, where a build that was stopped goes on, and becomes the version in use when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import sicot_jax
from sicot_jax import folded, imprint, mesh, pipeline, runs
from sicot_jax.catalog.catalog import Catalog, Record
from sicot_jax.catalog.opening import open_catalog
from sicot_jax.convert import folder as folders
from sicot_jax.convert.exported import Exported, exported, write_recognizer
from sicot_jax.errors import InputError
from sicot_jax.files import file_sha256, read_json, write_json
from sicot_jax.index import cards as cards_of
from sicot_jax.index import layout
from sicot_jax.index.cards import Cards
from sicot_jax.index.vectors import Vectors, fit_codebook, unit

BITS = 256
PICTURES = 4  # of a product that are kept to be shown
_PIECE = 16  # batches between two commits
_LINES = 1 << 16  # codes made at a time


def build(workdir: Path, index: Path, *, path: str = "", bits: int = BITS) -> Path:
    """The folder of the new version. `path`: where the run's catalogue lies now, if it was moved.

    InputError: an unfinished run, another catalogue than it was trained on, another process at work in `index`.
    """
    if bits % 8 or not 0 < bits <= 4096:
        raise InputError(f"--bits {bits}, wanted a multiple of 8 up to 4096")
    run = runs.read_run(workdir)
    run = runs.on_devices_here(run, runs.start_mesh(run.config), path)
    catalog = open_catalog(run.config.data)
    runs.check_data(run, catalog, "give the one it was trained on (--path)")
    if not len(order := _order(catalog)):
        raise InputError(f"{catalog.name}: no training photo of a product that is offered, wanted some to index")
    with layout.alone(index), exported(workdir) as found:
        folder = index / layout.BUILDING
        model = _write_model(folder, found, data=catalog.data_hash, bits=bits)
        width = found.classifier.kernel.shape[1]
        vectors, cards = Vectors(folder, width, bits), Cards(folder / layout.CARDS, writable=True)
        with contextlib.closing(cards):
            _embed(found, run, catalog, order, vectors, cards)
            _write_codes(folder, vectors, len(order), bits)
            _write_imprint(folder, vectors, len(order), found)
            cards.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if importlib.util.find_spec("torch") and importlib.util.find_spec("onnxscript"):
            _write_graph(folder, found)
        manifest = layout.Manifest(
            model=model,
            run=workdir.absolute().name,
            data=catalog.data_hash,
            width=width,
            bits=bits,
            photos=len(order),
            products=len(catalog.classes) - int(catalog.classes.withdrawn.sum()),
            categories=_ranges(catalog, order),
            sha256={
                name: file_sha256(folder / name)
                for name in (layout.FEATURES, layout.CODES, layout.OWNERS, layout.CODEBOOK, layout.IMPRINT)
            },
            created=runs.now(),
            version=sicot_jax.__version__,
        )
        (folder / layout.PROGRESS).unlink()
        layout.write_manifest(folder, manifest)
        return layout.publish(index, folder)


def _write_model(folder: Path, found: Exported, *, data: str, bits: int) -> str:
    """The recogniser and empty cards in a new folder, unless a build of the same begins there; sha256 of its weights."""
    mark = folder / layout.PROGRESS
    same = {"run": found.source, "data": data, "bits": bits, "version": sicot_jax.__version__}
    if mark.exists():
        begun = read_json(mark, "what a build left behind")
        if begun["of"] == same:
            return begun["model"]
        print(f"{folder}: of another run, catalogue or version; built anew", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / layout.MODEL).mkdir(parents=True)
    write_recognizer(folder / layout.MODEL, found)
    folders.write_manifest(folder / layout.MODEL, {})
    model = file_sha256(folder / layout.MODEL / folders.WEIGHTS)
    Cards.create(folder / layout.CARDS).close()
    write_json(mark, {"of": same, "model": model})
    return model


def _write_graph(folder: Path, found: Exported) -> None:
    from sicot_jax.convert.to_onnx import write_onnx

    shutil.rmtree(folder / layout.GRAPH, ignore_errors=True)
    (folder / layout.GRAPH).mkdir()
    write_onnx(folder / layout.GRAPH, found)


def _order(catalog: Catalog) -> np.ndarray:
    """Training photos of products that are offered, by category and product: a category is one range of lines."""
    labels = np.asarray(catalog.splits["train"].labels)
    category = np.unique(np.asarray(catalog.classes.category, str), return_inverse=True)[1]
    order = np.lexsort((np.arange(len(labels)), labels, category[labels]))
    return order[~np.asarray(catalog.classes.withdrawn, bool)[labels[order]]]


def _ranges(catalog: Catalog, order: np.ndarray) -> dict[str, list[int]]:
    names, first = np.unique(
        np.asarray(catalog.classes.category, str)[catalog.splits["train"].labels[order]], return_index=True
    )
    ends = [*first[1:].tolist(), len(order)]
    return {str(name): [int(start), end] for name, start, end in zip(names, first, ends, strict=True)}


def _embed(found: Exported, run: runs.Run, catalog: Catalog, order: np.ndarray, vectors: Vectors, cards: Cards) -> None:
    """Features, owners and cards of all photos, from where an earlier build stopped; a commit every few batches."""
    split, size = catalog.splits["train"], run.config.eval.batch_size
    with cards.change() as connection:
        classes = catalog.classes
        cards_of.put_products(
            connection,
            ((c, classes.sku[c], classes.title[c], "", classes.category[c], {}) for c in range(len(classes))),
        )
        gone = ((int(c),) for c in np.flatnonzero(classes.withdrawn))
        connection.executemany("UPDATE products SET withdrawn = 1 WHERE product = ?", gone)
    done = cards.state(vectors.width).places
    batches = pipeline.PhotoBatches(split, run.config.preprocessing, size, order)
    labels = np.asarray(split.labels)[order]
    starts = np.flatnonzero(np.r_[True, np.diff(labels) != 0])  # a product's photos follow each other
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    ahead = pipeline.ahead(
        batches, done // size, len(batches), workers=run.config.data.workers, source=run.config.data.source
    )
    rows: list[np.ndarray] = []
    ids: list[str] = []
    with tqdm(total=len(order), initial=done, unit="photo", desc="embedding", file=sys.stderr, mininterval=1) as bar:
        for embedding, batch in _embedded(found, ahead):
            real = batch["label"] >= 0
            rows.append(embedding[real])
            ids += batch["image_id"][real].tolist()
            bar.update(int(real.sum()))
            if len(rows) == _PIECE or done + len(ids) == len(order):
                done = _commit(np.concatenate(rows), ids, done, split, order, rank, vectors, cards)
                rows, ids = [], []


def _commit(features, ids, done: int, split, order, rank, vectors: Vectors, cards: Cards) -> int:
    end = done + len(ids)
    owners = split.labels[order[done:end]]
    vectors.write(layout.FEATURES, done, features)
    vectors.write(layout.OWNERS, done, owners)

    def photos() -> Iterator[tuple[int, int, str, bytes | None]]:
        for place in range(done, end):
            jpeg = None
            if rank[place] < PICTURES:
                record = split[int(order[place])]
                jpeg = _jpeg(record)
                if record["tags"] and not rank[place]:
                    tags[int(owners[place - done])] = record["tags"]
            yield place, int(owners[place - done]), ids[place - done], jpeg

    tags: dict[int, str] = {}
    with cards.change() as connection:
        cards_of.put_photos(connection, photos())
        connection.executemany("UPDATE products SET tags = ? WHERE product = ?", ((t, p) for p, t in tags.items()))
        cards_of.set_places(connection, end)
    return end


def _jpeg(record: Record) -> bytes:
    from PIL import Image

    from sicot_jax.catalog import image

    stored = record["image"]
    return stored if isinstance(stored, bytes) else image.encode(Image.fromarray(stored))


def _embedded(found: Exported, batches: Iterator[dict[str, Any]]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """(unit features float16 [B, D], batch), one batch late so that the devices never wait."""
    devices = mesh.make_mesh()
    with jax.set_mesh(devices):
        weights = mesh.copy_to_all(folded.fold(found.arrays), devices)

        @jax.jit
        def embed(weights, image):
            image = found.preprocessing.normalise(found.preprocessing.centre_crop(image))
            return mesh.replicate(folded.embed(found.model, weights, image))

        pending = None
        for batch in batches:
            result = embed(weights, pipeline.to_device(batch, devices)["image"])
            if pending is not None:
                yield _unit(pending[0]), pending[1]
            pending = result, batch
        if pending is not None:
            yield _unit(pending[0]), pending[1]


def _unit(embedding: jax.Array) -> np.ndarray:
    return unit(np.asarray(embedding)).astype(np.float16)


def _write_codes(folder: Path, vectors: Vectors, places: int, bits: int) -> None:
    features = vectors.mapped(layout.FEATURES, places)
    codebook = fit_codebook(features, bits)
    codebook.save(folder / layout.CODEBOOK)
    vectors.write(layout.CODES, 0, np.zeros((0, bits // 8), np.uint8))
    for first in range(0, places, _LINES):
        vectors.write(layout.CODES, first, codebook.encode(features[first : first + _LINES]))


def _write_imprint(folder: Path, vectors: Vectors, places: int, found: Exported) -> None:
    """What rows of later products are made with, from known ones."""
    import safetensors

    owners = vectors.mapped(layout.OWNERS, places)
    features = vectors.mapped(layout.FEATURES, places)
    products = np.unique(owners)
    some = products[pipeline.evenly(len(products), imprint.KNOWN)]
    photos = imprint.first_photos(owners, some)
    known, means = imprint.mean_directions(features[photos], owners[photos])
    with safetensors.safe_open(folder / layout.MODEL / folders.WEIGHTS, framework="numpy") as file:
        kernel, bias = file.get_slice("fc.weight"), file.get_slice("fc.bias")
        rows = np.stack([kernel[int(c) : int(c) + 1][0] for c in known])
        mean_row, mean_bias = np.zeros(found.classifier.kernel.shape[1]), 0.0
        for first in range(0, found.model.classes, _LINES):
            part = slice(first, min(first + _LINES, found.model.classes))
            mean_row += kernel[part].sum(0, dtype=np.float64) / found.model.classes
            mean_bias += float(bias[part].sum(dtype=np.float64)) / found.model.classes
    made_with = imprint.fit(means, rows, mean_row.astype(np.float32), mean_bias)
    np.savez(folder / layout.IMPRINT, **dataclasses.asdict(made_with))
