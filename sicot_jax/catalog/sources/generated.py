"""The generated catalogue: product-like photos with noisy titles and a long tail, all from one
seed, nothing on disk.

Record i is made without making the others, so a million classes cost a few arrays and no files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
from typing import cast

import numpy as np

from sicot_jax.catalog.catalog import SPLITS, Catalog, ClassTable, Record, Split
from sicot_jax.catalog.sources import render as pictures
from sicot_jax.catalog.sources.lazy_strings import LazyStrings, checked_index
from sicot_jax.catalog.statistics import default_head_boundary
from sicot_jax.catalog.tokenizer import WordTokenizer, words
from sicot_jax.catalog.word_vectors import random_word_vectors, train_word_vectors
from sicot_jax.config.schema import GeneratedSpec
from sicot_jax.errors import InputError

# Part of the data hash: raise it with every change that alters a picture, a title or a table.
GENERATOR_VERSION = 1

PROMOTIONS = (
    *(
        "sale",
        "new arrival",
        "free shipping",
        "hot",
        "2026",
        "best price",
        "discount",
        "limited offer",
        "top quality",
    ),
    *(
        "gift",
        "fast delivery",
        "genuine",
        "in stock",
        "bestseller",
        "wholesale",
        "special deal",
        "original",
        "trend",
    ),
    *(
        "must have",
        "promotion",
        "clearance",
        "official store",
        "premium",
        "now",
        "only today",
        "recommended",
        "popular",
    ),
)
COLOURS = (
    "red",
    "orange",
    "yellow",
    "lime",
    "green",
    "mint",
    "cyan",
    "azure",
    "blue",
    "violet",
    "magenta",
    "pink",
)
_PATTERN_ENDS = (
    "",
    "line",
    "spot",
    "fade",
    "grid",
)  # "shirt", "shirtline", "shirtspot": a type is body and pattern
_KINDS = ("brand", "type", "colour", "pattern", "mark", "series")

_SAMPLED_TITLES = 10_000
_MAX_SERIES = 20_000
# Streams of random numbers that must not depend on one another.
_IDENTITY, _RANKS, _WORDS, _PHOTO, _TITLE = range(5)


def _check(spec: GeneratedSpec) -> None:
    def refuse(name: str, wanted: str) -> None:
        raise InputError(f"generated.{name}={getattr(spec, name)!r}, wanted {wanted}")

    if spec.num_classes < 1:
        refuse("num_classes", "at least 1")
    if spec.train_photos < spec.num_classes:
        refuse("train_photos", f"at least num_classes={spec.num_classes}, one photo of each class")
    if not 0 <= spec.zipf_exponent < 10:
        refuse("zipf_exponent", "0 (all classes alike) up to 10")
    for name in ("validation_per_class", "test_per_class"):
        if getattr(spec, name) < 1:
            refuse(name, "at least 1 photo of each class")
    if not 8 <= spec.image_size <= 1024:
        refuse("image_size", "8 to 1024 pixels")
    if len(spec.box_area) != 2 or not 0.01 <= spec.box_area[0] <= spec.box_area[1] <= 0.95:
        refuse("box_area", "(low, high) with 0.01 <= low <= high <= 0.95")
    for name in ("clutter", "informativeness", "word_sharing"):
        if not 0 <= getattr(spec, name) <= 1:
            refuse(name, "a share from 0 to 1")
    if not 0 <= spec.seed < 2**63:
        refuse("seed", "0 to 2^63 - 1")
    if spec.word_vectors not in ("word2vec", "random"):
        refuse("word_vectors", "'word2vec' or 'random'")
    if spec.word_vector_width < 1:
        refuse("word_vector_width", "at least 1")


def data_hash(spec: GeneratedSpec) -> str:
    """Hex sha256 of the spec and the generator's version."""
    fields = dataclasses.asdict(spec)
    for name in ("zipf_exponent", "clutter", "informativeness", "word_sharing"):
        fields[name] = float(fields[name])  # 1 and 1.0 are the same catalogue
    fields["box_area"] = [float(share) for share in spec.box_area]
    text = json.dumps({**fields, "generator_version": GENERATOR_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def zipf_counts(num_classes: int, photos: int, exponent: float) -> np.ndarray:
    """int64 [C], falling with rank r as max(1, s * r^-exponent), s such that they sum to `photos`
    >= C.
    """
    weights = np.arange(1, num_classes + 1, dtype=np.float64) ** -exponent
    # With the first k classes above one photo, s_k = (photos - (C - k)) / sum of their weights;
    # take the largest k whose last class indeed gets one or more.
    scale = (photos - num_classes + np.arange(1, num_classes + 1)) / np.cumsum(weights)
    above = np.flatnonzero(scale * weights >= 1)
    share = np.maximum(1, weights * scale[above[-1]]) if len(above) else np.ones(num_classes)
    counts = np.floor(share).astype(np.int64)
    by_remainder = np.argsort(counts - share, kind="stable")
    counts[by_remainder[: photos - counts.sum()]] += 1
    return counts


def _rng(seed: int, stream: int, split: int = 0, index: int = 0) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, stream << 56 | split << 48 | index], np.uint64))
    )


_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def _pseudo_word(number: int, syllables: int) -> str:
    """A different word for each number below 70^syllables."""
    base = len(_CONSONANTS) * len(_VOWELS)
    number = (
        number * 1_000_003 + 12_345
    ) % base**syllables  # prime to the base: neighbours look unlike each other
    parts = []
    for _ in range(syllables):
        number, digit = divmod(number, base)
        parts.append(_CONSONANTS[digit // len(_VOWELS)] + _VOWELS[digit % len(_VOWELS)])
    return "".join(parts)


def _syllables(count: int) -> int:
    return max(2, math.ceil(math.log(count + 1, len(_CONSONANTS) * len(_VOWELS))))


class _World:
    """Everything about a spec that all records share: counts and, per class, a few numbers in
    arrays.
    """

    def __init__(self, spec: GeneratedSpec):
        self.spec = spec
        self.data_hash = data_hash(spec)
        total = spec.num_classes
        self.counts = np.empty(total, np.int64)
        order = _rng(spec.seed, _RANKS).permutation(total)
        self.counts[order] = zipf_counts(total, spec.train_photos, spec.zipf_exponent)
        self.ends = np.cumsum(self.counts)
        self.head_boundary = int(default_head_boundary(self.counts))
        self.is_head = self.counts > self.head_boundary

        # About sqrt(C) brands and product types, a few classes to a series: every word is shared by
        # several classes.
        root = max(1, round(math.sqrt(total)))
        self.num_brands = root
        num_types = min(len(pictures.BODIES) * len(pictures.PATTERNS), max(4, root))
        series_per_brand = max(1, min(round(total / root / 4), _MAX_SERIES // root))
        rng = _rng(spec.seed, _IDENTITY)
        # Types spread over bodies and patterns before either repeats more than it must.
        bodies, patterns = (
            rng.permutation(len(pictures.BODIES)),
            rng.permutation(len(pictures.PATTERNS)),
        )
        number = np.arange(num_types)
        cycle = number // len(bodies)
        self.type_body = bodies[number % len(bodies)]
        self.type_pattern = patterns[(number + cycle) % len(patterns)]
        self.brand_mark = rng.integers(len(pictures.MARKS), size=self.num_brands)
        self.brand_mark_hue = rng.random(self.num_brands)
        self.brand_mark_value = np.where(rng.random(self.num_brands) < 0.5, 0.95, 0.5)
        self.brand_hue = rng.random(self.num_brands)
        num_series = self.num_brands * series_per_brand
        self.series_look = rng.random(
            (num_series, 4), dtype=np.float32
        )  # second hue, frequency, angle, mark size

        self.brand = rng.integers(self.num_brands, size=total, dtype=np.int32)
        self.type = rng.integers(num_types, size=total, dtype=np.int16)
        self.series = self.brand * series_per_brand + rng.integers(
            series_per_brand, size=total, dtype=np.int32
        )
        hue = self.brand_hue[self.brand] + 0.3 * (rng.random(total, dtype=np.float32) - 0.5)
        outside = (
            rng.random(total, dtype=np.float32) < 0.25
        )  # not all of a brand's products keep to its palette
        hue[outside] = rng.random(int(outside.sum()))
        self.hue = (hue % 1).astype(np.float32)
        self.look = rng.random(
            (total, 4), dtype=np.float32
        )  # saturation, value, aspect, mark place

        self._kind_sizes = {
            "brand": self.num_brands,
            "type": num_types,
            "colour": len(COLOURS),
            "pattern": len(pictures.PATTERNS),
            "mark": len(pictures.MARKS),
            "series": num_series,
        }
        # Evenly over the kinds, in random order within each: floor(word_sharing * number of words)
        # are shared.
        rng = _rng(spec.seed, _WORDS)
        self.shared: dict[str, np.ndarray] = {}
        start = 0
        for kind, size in self._kind_sizes.items():
            steps = np.floor((start + np.arange(size + 1)) * spec.word_sharing + 1e-9)
            self.shared[kind] = np.diff(steps)[rng.permutation(size)] > 0
            start += size

    def concepts(self, class_ids: np.ndarray | int) -> tuple:
        """Index of the class's word within each of `_KINDS`."""
        brand, kind = self.brand[class_ids], self.type[class_ids]
        colour = np.int64(np.floor(self.hue[class_ids] * len(COLOURS) + 0.5)) % len(COLOURS)
        return (
            brand,
            kind,
            colour,
            self.type_pattern[kind],
            self.brand_mark[brand],
            self.series[class_ids],
        )

    def type_word(self, number: int) -> str:
        return pictures.BODIES[self.type_body[number]] + _PATTERN_ENDS[self.type_pattern[number]]

    def word(self, kind: str, number: int, head: bool) -> str:
        """The word of a concept as head or tail classes use it."""
        number = int(number)
        match kind:
            case "brand":
                word = _pseudo_word(number, _syllables(self.num_brands))
            case "series":  # ends unlike a brand
                word = _pseudo_word(number, _syllables(len(self.series_look))) + "x"
            case "type":
                word = self.type_word(number)
            case "colour":
                word = COLOURS[number]
            case "pattern":
                word = pictures.PATTERNS[number]
            case _:
                word = pictures.MARKS[number] + "logo"
        # Spelt backwards the tail's form has no piece in common with the head's, for sentencepiece
        # either.
        return word if head or self.shared[kind][number] else word[::-1]

    def vocabulary(self) -> list[str]:
        """Padding, promotion words, then each informative word in the forms that some class uses,
        kind by kind.
        """
        found = ["", *dict.fromkeys(words(" ".join(PROMOTIONS)))]
        head, tail = np.flatnonzero(self.is_head), np.flatnonzero(~self.is_head)
        in_head, in_tail = self.concepts(head), self.concepts(tail)
        for kind, of_head, of_tail in zip(_KINDS, in_head, in_tail, strict=True):
            forms = [self.word(kind, number, True) for number in np.unique(of_head).tolist()]
            forms += [self.word(kind, number, False) for number in np.unique(of_tail).tolist()]
            found += dict.fromkeys(forms)
        return found

    def product(self, class_id: int) -> pictures.Product:
        brand, kind, series = (
            int(self.brand[class_id]),
            int(self.type[class_id]),
            int(self.series[class_id]),
        )
        saturation, value, aspect, mark_place = self.look[class_id].tolist()
        second_hue, frequency, angle, mark_size = self.series_look[series].tolist()
        value = 0.35 + 0.6 * value
        return pictures.Product(
            body=int(self.type_body[kind]),
            pattern=int(self.type_pattern[kind]),
            mark=int(self.brand_mark[brand]),
            colour=(float(self.hue[class_id]), 0.45 + 0.5 * saturation, value),
            second_colour=(second_hue, 0.6, 0.3 if value > 0.65 else 0.95),
            mark_colour=(
                float(self.brand_mark_hue[brand]),
                0.95,
                float(self.brand_mark_value[brand]),
            ),
            aspect=math.exp(0.8 * (aspect - 0.5)),
            pattern_angle=math.pi * angle,
            pattern_frequency=(4.5, 7.0, 10.0)[int(3 * frequency)],
            mark_place=mark_place,
            mark_size=0.22 + 0.12 * mark_size,
        )

    def class_of(self, split: str, index: int) -> int:
        if split == "train":
            return int(np.searchsorted(self.ends, index, side="right"))
        return index // self.per_class(split)

    def per_class(self, split: str) -> int:
        return self.spec.validation_per_class if split == "validation" else self.spec.test_per_class

    def length(self, split: str) -> int:
        return (
            self.spec.train_photos
            if split == "train"
            else self.spec.num_classes * self.per_class(split)
        )

    def title(self, split: str, index: int) -> str:
        class_id = self.class_of(split, index)
        draw = iter(
            _rng(self.spec.seed, _TITLE, SPLITS.index(split), index).random(32).tolist()
        ).__next__

        def promotion() -> str:
            return PROMOTIONS[int(draw() * len(PROMOTIONS))]

        head = bool(self.is_head[class_id])
        parts: list[tuple[float, str]] = []
        for kind, number in zip(_KINDS, self.concepts(class_id), strict=True):
            if draw() < self.spec.informativeness:
                parts.append((draw(), self.word(kind, number, head)))
            elif draw() < 0.5:
                parts.append((draw(), promotion()))
        for _ in range(1 + int(3 * draw())):
            parts.append((draw(), promotion()))
        return " ".join(word for _, word in sorted(parts))


@functools.lru_cache(maxsize=4)
def _world(spec: GeneratedSpec) -> _World:
    return _World(spec)


class GeneratedSplit:
    """Records of one split, made when asked for; pickles as its spec."""

    def __init__(self, spec: GeneratedSpec, name: str, tokenizer: WordTokenizer):
        self._spec, self._name, self._tokenizer = spec, name, tokenizer
        self._world = _world(spec)

    def __reduce__(self) -> tuple:
        return _open_split, (self._spec, self._name)

    def __len__(self) -> int:
        return self._world.length(self._name)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [N]."""
        ids = np.arange(self._spec.num_classes, dtype=np.int32)
        return np.repeat(
            ids, self._world.counts if self._name == "train" else self._world.per_class(self._name)
        )

    def __getitem__(self, index: int) -> Record:
        world, index = self._world, checked_index(index, len(self))
        class_id = world.class_of(self._name, index)
        rng = _rng(self._spec.seed, _PHOTO, SPLITS.index(self._name), index)
        distractor = int(rng.integers(self._spec.num_classes))
        image, box = pictures.render(
            world.product(class_id),
            world.product(distractor),
            size=self._spec.image_size,
            box_area=self._spec.box_area,
            clutter=self._spec.clutter,
            rng=rng,
        )
        title = world.title(self._name, index)
        return Record(
            image_id=f"{world.data_hash[:12]}-{self._name}-{index}",
            image=image,
            sku=_sku(class_id),
            class_id=class_id,
            title=title,
            tags="",
            token_ids=self._tokenizer.encode(title),
            category=world.type_word(world.type[class_id]),
            box=box,
            role="catalogue",
            reference=f"generated/{self._name}/{index}",
        )


def _sku(class_id: int) -> str:
    return f"sku-{class_id:07d}"


@functools.lru_cache(maxsize=4)
def _tokenizer(spec: GeneratedSpec) -> WordTokenizer:
    return WordTokenizer(_world(spec).vocabulary())


def _open_split(spec: GeneratedSpec, name: str) -> GeneratedSplit:
    return GeneratedSplit(spec, name, _tokenizer(spec))


def open_generated(spec: GeneratedSpec) -> Catalog:
    """The catalogue of a spec; equal specs give equal catalogues on every machine and in every
    process.

    The vocabulary is known in closed form: every word that a class can have in a title, and the
      promotion words (their low value is for the attention to find). Raises InputError naming the
      field that is out of range.
    """
    _check(spec)
    spec = dataclasses.replace(
        spec, box_area=(spec.box_area[0], spec.box_area[1])
    )  # a list, after a trip through JSON
    world, tokenizer = _world(spec), _tokenizer(spec)
    size, width = len(tokenizer.vocabulary), spec.word_vector_width
    if spec.word_vectors == "random":
        vectors = random_word_vectors(size, width, spec.seed)
    else:
        photos = np.linspace(
            0, spec.train_photos - 1, min(spec.train_photos, _SAMPLED_TITLES)
        ).astype(np.int64)
        sample = [tokenizer.encode(world.title("train", index)) for index in photos.tolist()]
        vectors = train_word_vectors(sample, vocabulary_size=size, width=width, seed=spec.seed)
    total = spec.num_classes
    classes = ClassTable(
        sku=LazyStrings(total, _sku),
        title=LazyStrings(
            total, lambda c: world.title("train", int(world.ends[c] - world.counts[c]))
        ),
        category=LazyStrings(total, lambda c: world.type_word(world.type[c])),
        counts={
            "train": world.counts,
            "validation": np.full(total, spec.validation_per_class, np.int64),
            "test": np.full(total, spec.test_per_class, np.int64),
        },
        discontinued=np.zeros(total, bool),
    )
    return Catalog(
        name="generated",
        data_hash=world.data_hash,
        classes=classes,
        head_boundary=world.head_boundary,
        tokenizer=tokenizer,
        word_vectors=vectors,
        splits={name: cast(Split, _open_split(spec, name)) for name in SPLITS},
    )


@dataclasses.dataclass(frozen=True)
class GeneratedPhotos:
    """Reader of photos by "split/index" as PNG, for an import that writes the catalogue to disk."""

    spec: GeneratedSpec

    def read(self, image: str) -> bytes:
        from PIL import Image

        split, _, index = image.partition("/")
        out = io.BytesIO()
        photo = _open_split(self.spec, split)[int(index)]["image"]
        Image.fromarray(np.asarray(photo)).save(out, "PNG", compress_level=1)
        return out.getvalue()
