"""Recognising photos from Python: `sicot_jax.load(path)`, one interface over JAX and ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from sicot_jax.catalog.catalog import ClassTable
from sicot_jax.catalog.sources.tables import read_class_table
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError
from sicot_jax.weights import bundle as folders
from sicot_jax.weights.bundle import Converted

Photo = Any  # a file, its bytes, uint8 [H, W, 3], or a Pillow image
LARGEST_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Match:
    """One product that a photo may show; `probability` over all products."""

    class_id: int
    sku: str
    title: str
    probability: float


class Found(NamedTuple):
    """What an engine finds in B photos: embedding float32 [B, D], logits float32 [B, C], and where
    the product is, box float32 [B, 4]: (left, top, right, bottom), fractions of the photo that the
    engine was given; None of a model without a box branch.
    """

    embedding: np.ndarray
    logits: np.ndarray
    box: np.ndarray | None = None

    def each(self) -> Iterator[Found]:
        """Of every photo alone: [D], [C], [4]. ValueError where there are not as many of one as of
        another.
        """
        boxes = [None] * len(self.logits) if self.box is None else self.box
        return map(Found._make, zip(self.embedding, self.logits, boxes, strict=True))


class Engine(Protocol):
    """uint8 [B, height, width, 3] -> what is in them."""

    def __call__(self, photos: np.ndarray) -> Found: ...


class Recognizer:
    """Photos -> products. Not more than `LARGEST_BATCH` photos are on the device at a time."""

    def __init__(self, engine: Engine, preprocessing: Preprocessing, classes: ClassTable):
        self.engine, self.preprocessing, self.classes = engine, preprocessing, classes

    def recognize(self, photos: Photo | Sequence[Photo], k: int = 5) -> Any:
        """The k most probable products, best first, fewer where there are fewer: a list of `Match`
        for one photo, a list of lists for several. Discontinued products are none.

        InputError: a photo that cannot be decoded, k below 1.
        """
        if k < 1:
            raise InputError(f"k={k}, wanted 1 or more")
        offered = np.flatnonzero(~np.asarray(self.classes.discontinued, bool))
        k = min(k, len(offered))
        several = _several(photos)
        found = []
        for batch in self._batches(several):
            logits = batch.logits[:, offered]
            order = np.argpartition(-logits, k - 1, 1)[:, :k]
            best = np.take_along_axis(
                order, np.argsort(-np.take_along_axis(logits, order, 1), 1, kind="stable"), 1
            )
            highest = logits.max(1, keepdims=True)
            total = np.exp(logits - highest, dtype=np.float64).sum(1, keepdims=True)
            probability = np.exp(np.take_along_axis(logits, best, 1) - highest) / total
            found += [
                list(map(self._match, *row))
                for row in zip(offered[best].tolist(), probability.tolist(), strict=True)
            ]
        return found if several is photos else found[0]

    def embed(self, photos: Photo | Sequence[Photo]) -> np.ndarray:
        """Embeddings float32 [D] of one photo, [N, D] of several: what the classifier sees, not
        normalised.
        """
        several = _several(photos)
        rows = np.concatenate([batch.embedding for batch in self._batches(several)])
        return rows if several is photos else rows[0]

    def _match(self, class_id: int, probability: float) -> Match:
        return Match(
            class_id, self.classes.sku[class_id], self.classes.title[class_id], probability
        )

    def _batches(self, photos: Sequence[Photo]) -> Iterator[Found]:
        if not len(photos):
            raise InputError("no photo, wanted one or more")
        for start in range(0, len(photos), LARGEST_BATCH):
            part = np.stack([self._load(photo) for photo in photos[start : start + LARGEST_BATCH]])
            yield self.engine(self.preprocessing.centre_crop(part))

    def _load(self, photo: Photo) -> np.ndarray:
        if isinstance(photo, (str, Path)):
            try:
                return self.preprocessing.load(Path(photo).read_bytes())
            except OSError as error:
                raise InputError(f"{photo}: {error.strerror}; wanted a photo's file") from error
        if _is_opened(photo):
            from sicot_jax.common import image

            photo = image.photo_pixels(photo)
        if isinstance(photo, np.ndarray) and (
            photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size
        ):
            raise InputError(
                f"a photo is {photo.dtype} {photo.shape}, wanted uint8 [height, width, 3], RGB"
            )
        if not isinstance(photo, (bytes, np.ndarray)):
            raise InputError(
                f"a photo is {type(photo).__name__}, wanted a file, bytes, uint8 [height, width, 3] or a Pillow image"
            )
        return self.preprocessing.load(photo)


def _is_opened(photo: Any) -> bool:
    """Whether it is an image of Pillow's."""
    return hasattr(photo, "getexif")


def _several(photos: Any) -> Sequence[Photo]:
    """The argument itself where it is several photos, else a list of the one."""
    one = isinstance(photos, (str, Path, bytes)) or _is_opened(photos)
    one = one or (isinstance(photos, np.ndarray) and photos.ndim <= 3)
    if not one and not hasattr(photos, "__getitem__"):
        raise InputError(f"photos are {type(photos).__name__}, wanted one photo or a list of them")
    return [photos] if one else photos


def load(path: str | Path) -> Recognizer:
    """The recogniser of a run folder, or of a folder of `sicot convert`: ONNX Runtime where it
    holds a graph, else JAX.

    InputError: neither, an unfinished run, a folder that is not as it was written.
    """
    path = Path(path)
    if (path / folders.GRAPH).exists():
        converted = folders.read_converted(path)
        return Recognizer(
            onnx_engine(path), converted.preprocessing, folders.read_classes(path, converted.model)
        )
    if folders.is_converted(path):
        converted = folders.read_converted(path)
        engine = jax_engine(converted)
        return Recognizer(
            engine, converted.preprocessing, folders.read_classes(path, converted.model)
        )
    from sicot_jax.export.from_run import exported

    with exported(path) as found:
        count = found.model.classes
        rows = {"fc.weight": found.classifier.kernel, "fc.bias": found.classifier.bias}
        arrays = found.arrays | {name: np.asarray(array)[:count] for name, array in rows.items()}
    return Recognizer(
        _jax(found.model, found.preprocessing, arrays),
        found.preprocessing,
        read_class_table(found.class_table),
    )


def jax_engine(converted: Converted) -> Engine:
    """The recogniser of a folder of to-torch by JAX, batch norms folded. InputError where there is
    none in it.
    """
    import safetensors.numpy

    if not converted.model.classes:
        raise InputError(
            f"{converted.folder}: weights without a classifier; train from them (model.init_from)"
        )
    if (converted.folder / folders.PROGRAM).exists():
        raise InputError(
            f"{converted.folder}: StableHLO is loaded by jax.export; give the run folder, or one of to-torch"
        )
    arrays = safetensors.numpy.load_file(converted.folder / folders.WEIGHTS)
    return _jax(converted.model, converted.preprocessing, arrays)


def _jax(
    model: folders.Model, preprocessing: Preprocessing, arrays: dict[str, np.ndarray]
) -> Engine:
    import jax

    from sicot_jax.weights import batch_norm_folding as folded

    device = jax.devices()[0]
    small = jax.device_put(
        {**folded.fold(arrays), "fc": arrays["fc.weight"].T, "fc.bias": arrays["fc.bias"]}, device
    )

    @jax.jit
    def run(weights, photos):
        embedding, box = folded.look(model, weights, preprocessing.normalise(photos))
        return Found(embedding, embedding @ weights["fc"] + weights["fc.bias"], box)

    def engine(photos: np.ndarray) -> Found:
        # A program for each power of two, not for each number of photos.
        padded = np.zeros((1 << (len(photos) - 1).bit_length(), *photos.shape[1:]), np.uint8)
        padded[: len(photos)] = photos
        return jax.tree.map(lambda array: np.asarray(array)[: len(photos)], run(small, padded))

    return engine


def onnx_engine(folder: Path, *, threads: int = 0) -> Engine:
    """The graph of a folder of to-onnx by ONNX Runtime, on `threads` cores (0: as many as there
    are).
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"{folder}: no onnxruntime here; install it: pip install 'sicot_jax[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads sleep while they wait: spinning, they hold cores that photos are decoded on (a
    # fifth more photos a second).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        str(folder / folders.GRAPH), options, providers=onnxruntime.get_available_providers()
    )
    outputs = [output.name for output in session.get_outputs()]
    if "logits" not in outputs:
        raise InputError(
            f"{folder}: a graph with its best classes inside; convert without --top-k to load it here"
        )
    wanted = [name for name in Found._fields if name in outputs]  # the box is not in every graph
    return lambda photos: Found(
        **dict(zip(wanted, session.run(wanted, {"photos": photos}), strict=True))
    )
