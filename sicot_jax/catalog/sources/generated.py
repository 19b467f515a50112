"""Opens the generated catalogue: photos and titles made from one seed, nothing on disk.

Record i is made without making the others, so a million classes cost a few arrays and no files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from typing import cast

import numpy as np

from sicot_jax.catalog.catalog import SPLITS, Catalog, ClassTable, Record, Split
from sicot_jax.catalog.sources.generated_products import (
    PHOTO_STREAM,
    ProductWorld,
    catalog_stream,
)
from sicot_jax.catalog.sources.render import render_photo
from sicot_jax.catalog.sources.tables import LazyStrings, checked_index
from sicot_jax.catalog.tokenizer import WordTokenizer
from sicot_jax.catalog.word_vectors import random_word_vectors, train_word_vectors
from sicot_jax.config import GeneratedSpec

# Part of the data hash: raise it with every change that alters a photo, a title or a table.
GENERATOR_VERSION = 1
_MAX_WORD2VEC_TITLES = 10_000


def generated_data_hash(spec: GeneratedSpec) -> str:
    """Returns the data hash of a generated catalogue, known without making it.

    Args:
      spec: specification of the catalogue.

    Returns:
      Hex SHA-256 of the spec and the generator's version.
    """
    fields = dataclasses.asdict(spec)
    for name in ("zipf_exponent", "clutter", "informativeness", "word_sharing"):
        fields[name] = float(fields[name])  # 1 and 1.0 are the same catalogue
    fields["box_area"] = [float(share) for share in spec.box_area]
    text = json.dumps({**fields, "generator_version": GENERATOR_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _load_world(spec: GeneratedSpec) -> ProductWorld:
    return ProductWorld(spec)


@functools.lru_cache(maxsize=4)
def _load_tokenizer(spec: GeneratedSpec) -> WordTokenizer:
    return WordTokenizer(_load_world(spec).vocabulary())


class GeneratedSplit:
    """Records of one split, made when asked for; pickles as its spec.

    Attributes:
      labels: int32 [N].
    """

    def __init__(self, spec: GeneratedSpec, name: str) -> None:
        self._spec, self._name = spec, name
        self._world, self._tokenizer = _load_world(spec), _load_tokenizer(spec)
        self._id_prefix = generated_data_hash(spec)[:12]

    def __reduce__(self) -> tuple:
        return GeneratedSplit, (self._spec, self._name)

    def __len__(self) -> int:
        return self._world.length(self._name)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Class ids, int32 [N]."""
        return self._world.labels(self._name)

    def __getitem__(self, index: int) -> Record:
        world, index = self._world, checked_index(index, len(self))
        class_id = world.class_of(self._name, index)
        rng = catalog_stream(self._spec.seed, PHOTO_STREAM, SPLITS.index(self._name), index)
        distractor = int(rng.integers(self._spec.num_classes))
        image, box = render_photo(
            world.product(class_id),
            world.product(distractor),
            size=self._spec.image_size,
            box_area=self._spec.box_area,
            clutter=self._spec.clutter,
            rng=rng,
        )
        title = world.title(self._name, index)
        return Record(
            image_id=f"{self._id_prefix}-{self._name}-{index}",
            image=image,
            sku=_sku(class_id),
            class_id=class_id,
            title=title,
            tags="",
            token_ids=self._tokenizer.encode(title),
            category=world.category(class_id),
            box=box,
            role="catalogue",
            reference=f"generated/{self._name}/{index}",
        )


def _sku(class_id: int) -> str:
    return f"sku-{class_id:07d}"


def open_generated(spec: GeneratedSpec) -> Catalog:
    """Opens the catalogue of a spec; equal specs give equal catalogues on every machine.

    The vocabulary is known in closed form: every word that a class can have in a title, and the
    promotion words.

    Args:
      spec: what to generate.

    Returns:
      The catalogue.

    """
    # A list, after a trip through JSON.
    spec = dataclasses.replace(spec, box_area=(spec.box_area[0], spec.box_area[1]))
    world, tokenizer = _load_world(spec), _load_tokenizer(spec)
    total = spec.num_classes
    classes = ClassTable(
        sku=LazyStrings(total, _sku),
        title=LazyStrings(total, world.first_title),
        category=LazyStrings(total, world.category),
        counts={
            "train": world.counts,
            "validation": np.full(total, spec.validation_per_class, np.int64),
            "test": np.full(total, spec.test_per_class, np.int64),
        },
        discontinued=np.zeros(total, bool),
    )
    return Catalog(
        name="generated",
        data_hash=generated_data_hash(spec),
        classes=classes,
        head_boundary=world.head_boundary,
        tokenizer=tokenizer,
        word_vectors=_word_vectors(spec, world, tokenizer),
        splits={name: cast(Split, GeneratedSplit(spec, name)) for name in SPLITS},
    )


def _word_vectors(spec: GeneratedSpec, world: ProductWorld, tokenizer: WordTokenizer) -> np.ndarray:
    size, width = len(tokenizer.vocabulary), spec.word_vector_width
    if spec.word_vectors == "random":
        return random_word_vectors(size, width, spec.seed)
    count = min(spec.train_photos, _MAX_WORD2VEC_TITLES)
    sampled = np.linspace(0, spec.train_photos - 1, count).astype(np.int64)
    titles = [tokenizer.encode(world.title("train", index)) for index in sampled.tolist()]
    return train_word_vectors(titles, vocabulary_size=size, width=width, seed=spec.seed)


@dataclasses.dataclass(frozen=True)
class GeneratedPhotoReader:
    """Reads photos by "split/index" as PNG, for an import that writes the catalogue to disk."""

    spec: GeneratedSpec

    def read(self, image: str) -> bytes:
        """Returns a photo as a PNG file.

        Args:
          image: "split/index", such as "train/4".

        Returns:
          The bytes of the file.
        """
        from PIL import Image

        split, _, index = image.partition("/")
        out = io.BytesIO()
        photo = GeneratedSplit(self.spec, split)[int(index)]["image"]
        Image.fromarray(np.asarray(photo)).save(out, "PNG", compress_level=1)
        return out.getvalue()
