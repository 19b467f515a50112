"""Describes the products of a generated catalogue: class counts, appearance and noisy titles."""

from __future__ import annotations

import math

import numpy as np

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.catalog.sources.render import PATTERNS, ProductAppearance
from sicot_jax.catalog.sources.shapes import BODIES, MARKS
from sicot_jax.catalog.statistics import default_head_boundary
from sicot_jax.catalog.tokenizer import split_words
from sicot_jax.config import GeneratedSpec

PROMOTIONS = (
    "sale", "new arrival", "free shipping", "hot", "2026", "best price", "discount",
    "limited offer", "top quality", "gift", "fast delivery", "genuine", "in stock", "bestseller",
    "wholesale", "special deal", "original", "trend", "must have", "promotion", "clearance",
    "official store", "premium", "now", "only today", "recommended", "popular",
)  # fmt: skip
COLOURS = (
    "red", "orange", "yellow", "lime", "green", "mint",
    "cyan", "azure", "blue", "violet", "magenta", "pink",
)  # fmt: skip

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def pseudo_word(number: int, syllables: int) -> str:
    """Returns a different invented word for each number below 70^syllables.

    Args:
      number: number of the word.
      syllables: number of syllables of the word, each a consonant and a vowel.

    Returns:
      The word.
    """
    base = len(_CONSONANTS) * len(_VOWELS)
    # The factor is prime to the base: neighbours look unlike each other.
    number = (number * 1_000_003 + 12_345) % base**syllables
    parts = []
    for _ in range(syllables):
        number, digit = divmod(number, base)
        parts.append(_CONSONANTS[digit // len(_VOWELS)] + _VOWELS[digit % len(_VOWELS)])
    return "".join(parts)


def num_syllables(count: int) -> int:
    """Returns the number of syllables that gives `count` different words, at least two.

    Args:
      count: number of words.

    Returns:
      Syllables per word.
    """
    return max(2, math.ceil(math.log(count + 1, len(_CONSONANTS) * len(_VOWELS))))


WORD_KINDS = ("brand", "type", "colour", "pattern", "mark", "series")
# A type is body and pattern: "shirt", "shirtline", "shirtspot".
_PATTERN_SUFFIXES = ("", "line", "spot", "fade", "grid")
_MAX_SERIES = 20_000
# Streams of random numbers that must not depend on one another.
IDENTITY_STREAM, RANK_STREAM, WORD_STREAM, PHOTO_STREAM, TITLE_STREAM = range(5)


def zipf_counts(num_classes: int, photos: int, exponent: float) -> np.ndarray:
    """Divides photos over classes by Zipf's law, at least one photo each.

    Args:
      num_classes: C.
      photos: number of photos to divide, at least C.
      exponent: 0 for equal counts, larger for a longer tail.

    Returns:
      int64 [C], descending with rank r as max(1, s * r^-exponent), with s such that they sum to
      `photos`.
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


def catalog_stream(seed: int, stream: int, split: int = 0, index: int = 0) -> np.random.Generator:
    """Returns random numbers that depend on the arguments alone.

    Args:
      seed: seed of the catalogue.
      stream: purpose, one of the `*_STREAM` constants.
      split: number of the split.
      index: number of the record.

    Returns:
      A generator.
    """
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, stream << 56 | split << 48 | index], np.uint64))
    )


class ProductWorld:
    """What all records of a generated catalogue share: class counts, and a few numbers per class.

    Attributes:
      spec: specification of the catalogue.
      counts: int64 [C], training photos per class.
      head_boundary: a class with more training photos is head.
      is_head: bool [C].
      brand: int32 [C], type: int16 [C], series: int32 [C]: numbers of each class's words.
      hue: float32 [C], in [0, 1).
      shared: word kind -> bool [words], whether head and tail classes use the same form of it.
    """

    def __init__(self, spec: GeneratedSpec) -> None:
        self.spec = spec
        total = spec.num_classes
        self.counts = np.empty(total, np.int64)
        order = catalog_stream(spec.seed, RANK_STREAM).permutation(total)
        self.counts[order] = zipf_counts(total, spec.train_photos, spec.zipf_exponent)
        self._train_ends = np.cumsum(self.counts)
        self.head_boundary = int(default_head_boundary(self.counts))
        self.is_head = self.counts > self.head_boundary

        self._draw_products(catalog_stream(spec.seed, IDENTITY_STREAM))
        self.shared = self._draw_shared_words(catalog_stream(spec.seed, WORD_STREAM))

    def _draw_products(self, rng: np.random.Generator) -> None:
        total = self.spec.num_classes
        # About sqrt(C) brands and product types, a few classes to a series: every word is shared by
        # several classes.
        root = max(1, round(math.sqrt(total)))
        self._num_brands = root
        num_types = min(len(BODIES) * len(PATTERNS), max(4, root))
        series_per_brand = max(1, min(round(total / root / 4), _MAX_SERIES // root))
        # Types spread over bodies and patterns before either repeats more than it must.
        bodies, patterns = (
            rng.permutation(len(BODIES)),
            rng.permutation(len(PATTERNS)),
        )
        number = np.arange(num_types)
        cycle = number // len(bodies)
        self._type_body = bodies[number % len(bodies)]
        self._type_pattern = patterns[(number + cycle) % len(patterns)]
        self._brand_mark = rng.integers(len(MARKS), size=self._num_brands)
        self._brand_mark_hue = rng.random(self._num_brands)
        self._brand_mark_value = np.where(rng.random(self._num_brands) < 0.5, 0.95, 0.5)
        self._brand_hue = rng.random(self._num_brands)
        num_series = self._num_brands * series_per_brand
        # Second hue, pattern frequency, pattern angle, mark size.
        self._series_style = rng.random((num_series, 4), dtype=np.float32)

        self.brand = rng.integers(self._num_brands, size=total, dtype=np.int32)
        self.type = rng.integers(num_types, size=total, dtype=np.int16)
        self.series = self.brand * series_per_brand + rng.integers(
            series_per_brand, size=total, dtype=np.int32
        )
        hue = self._brand_hue[self.brand] + 0.3 * (rng.random(total, dtype=np.float32) - 0.5)
        # Not all of a brand's products keep to its palette.
        off_palette = rng.random(total, dtype=np.float32) < 0.25
        hue[off_palette] = rng.random(int(off_palette.sum()))
        self.hue = (hue % 1).astype(np.float32)
        # Saturation, value, aspect, mark position.
        self._class_style = rng.random((total, 4), dtype=np.float32)

        self._num_words = {
            "brand": self._num_brands,
            "type": num_types,
            "colour": len(COLOURS),
            "pattern": len(PATTERNS),
            "mark": len(MARKS),
            "series": num_series,
        }

    def _draw_shared_words(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Chooses floor(word_sharing * number of words) words, evenly over the kinds."""
        shared: dict[str, np.ndarray] = {}
        start = 0
        for kind, size in self._num_words.items():
            steps = np.floor((start + np.arange(size + 1)) * self.spec.word_sharing + 1e-9)
            shared[kind] = np.diff(steps)[rng.permutation(size)] > 0
            start += size
        return shared

    def word_numbers(self, class_ids: np.ndarray | int) -> tuple:
        """Returns the number of the class's word within each of `WORD_KINDS`.

        Args:
          class_ids: int or int [n].

        Returns:
          One int or int [n] for each kind.
        """
        brand, kind = self.brand[class_ids], self.type[class_ids]
        colour = np.int64(np.floor(self.hue[class_ids] * len(COLOURS) + 0.5)) % len(COLOURS)
        return (
            brand,
            kind,
            colour,
            self._type_pattern[kind],
            self._brand_mark[brand],
            self.series[class_ids],
        )

    def category(self, class_id: int) -> str:
        """Returns the word of the class's product type.

        Args:
          class_id: 0..C-1.

        Returns:
          The word.
        """
        return self._type_word(self.type[class_id])

    def _type_word(self, number: int) -> str:
        return BODIES[self._type_body[number]] + _PATTERN_SUFFIXES[self._type_pattern[number]]

    def word(self, kind: str, number: int, head: bool) -> str:
        """Returns a word in the form that head or tail classes use.

        Args:
          kind: one of `WORD_KINDS`.
          number: number within the kind.
          head: whether a head class uses it.

        Returns:
          The word.
        """
        number = int(number)
        match kind:
            case "brand":
                word = pseudo_word(number, num_syllables(self._num_brands))
            case "series":  # ends unlike a brand
                word = pseudo_word(number, num_syllables(len(self._series_style))) + "x"
            case "type":
                word = self._type_word(number)
            case "colour":
                word = COLOURS[number]
            case "pattern":
                word = PATTERNS[number]
            case _:
                word = MARKS[number] + "logo"
        # Spelt backwards, the tail's form shares no piece with the head's for sentencepiece either.
        return word if head or self.shared[kind][number] else word[::-1]

    def vocabulary(self) -> list[str]:
        """Returns padding, promotion words, then all informative words, kind by kind.

        Returns:
          [V] words by id; informative ones in the forms that some class uses.
        """
        vocabulary = ["", *dict.fromkeys(split_words(" ".join(PROMOTIONS)))]
        head, tail = np.flatnonzero(self.is_head), np.flatnonzero(~self.is_head)
        in_head, in_tail = self.word_numbers(head), self.word_numbers(tail)
        for kind, of_head, of_tail in zip(WORD_KINDS, in_head, in_tail, strict=True):
            forms = [self.word(kind, number, True) for number in np.unique(of_head).tolist()]
            forms += [self.word(kind, number, False) for number in np.unique(of_tail).tolist()]
            vocabulary += dict.fromkeys(forms)
        return vocabulary

    def product(self, class_id: int) -> ProductAppearance:
        """Returns what all photos of a class have in common.

        Args:
          class_id: 0..C-1.

        Returns:
          The appearance.
        """
        brand, kind, series = (
            int(self.brand[class_id]),
            int(self.type[class_id]),
            int(self.series[class_id]),
        )
        saturation, value, aspect, mark_position = self._class_style[class_id].tolist()
        second_hue, frequency, angle, mark_size = self._series_style[series].tolist()
        value = 0.35 + 0.6 * value
        return ProductAppearance(
            body=int(self._type_body[kind]),
            pattern=int(self._type_pattern[kind]),
            mark=int(self._brand_mark[brand]),
            colour=(float(self.hue[class_id]), 0.45 + 0.5 * saturation, value),
            second_colour=(second_hue, 0.6, 0.3 if value > 0.65 else 0.95),
            mark_colour=(
                float(self._brand_mark_hue[brand]),
                0.95,
                float(self._brand_mark_value[brand]),
            ),
            aspect=math.exp(0.8 * (aspect - 0.5)),
            pattern_angle=math.pi * angle,
            pattern_frequency=(4.5, 7.0, 10.0)[int(3 * frequency)],
            mark_position=mark_position,
            mark_size=0.22 + 0.12 * mark_size,
        )

    def class_of(self, split: str, index: int) -> int:
        """Returns the class id of a record.

        Args:
          split: one of `SPLITS`.
          index: number of the record.

        Returns:
          0..C-1.
        """
        if split == "train":
            return int(np.searchsorted(self._train_ends, index, side="right"))
        return index // self._photos_per_class(split)

    def labels(self, split: str) -> np.ndarray:
        """Returns the class ids of a split's records.

        Args:
          split: one of `SPLITS`.

        Returns:
          int32 [N].
        """
        ids = np.arange(self.spec.num_classes, dtype=np.int32)
        return np.repeat(ids, self.counts if split == "train" else self._photos_per_class(split))

    def _photos_per_class(self, split: str) -> int:
        return self.spec.validation_per_class if split == "validation" else self.spec.test_per_class

    def length(self, split: str) -> int:
        """Returns the number of a split's records.

        Args:
          split: one of `SPLITS`.

        Returns:
          N.
        """
        if split == "train":
            return self.spec.train_photos
        return self.spec.num_classes * self._photos_per_class(split)

    def first_title(self, class_id: int) -> str:
        """Returns the title of the class's first training photo.

        Args:
          class_id: 0..C-1.

        Returns:
          The title.
        """
        return self.title("train", int(self._train_ends[class_id] - self.counts[class_id]))

    def title(self, split: str, index: int) -> str:
        """Returns the noisy title of a record.

        Each of the class's words appears with probability `informativeness`, else a promotion word
        may take its position; one to three promotion words are added, and all are shuffled.

        Args:
          split: one of `SPLITS`.
          index: number of the record.

        Returns:
          The title.
        """
        class_id = self.class_of(split, index)
        draw = iter(
            catalog_stream(self.spec.seed, TITLE_STREAM, SPLITS.index(split), index)
            .random(32)
            .tolist()
        ).__next__

        def promotion() -> str:
            return PROMOTIONS[int(draw() * len(PROMOTIONS))]

        head = bool(self.is_head[class_id])
        parts: list[tuple[float, str]] = []
        for kind, number in zip(WORD_KINDS, self.word_numbers(class_id), strict=True):
            if draw() < self.spec.informativeness:
                parts.append((draw(), self.word(kind, number, head)))
            elif draw() < 0.5:
                parts.append((draw(), promotion()))
        parts += [(draw(), promotion()) for _ in range(1 + int(3 * draw()))]
        return " ".join(word for _, word in sorted(parts))
