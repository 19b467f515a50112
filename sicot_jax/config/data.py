"""Config sections of the data: where records come from, and the generated catalogue."""

from __future__ import annotations

import dataclasses

from sicot_jax.config.batch_plan import SAMPLING_SCHEMES
from sicot_jax.config.checks import ConfigError, FieldChecks


@dataclasses.dataclass(frozen=True)
class GeneratedSpec:
    """Describes a synthetic catalogue: `data.generated.*`.

    Attributes:
      num_classes: C, the number of SKUs.
      train_photos: N, all training photos; counts per class fall as rank^-zipf_exponent, with at
        least one each and the ranks in random order.
      zipf_exponent: exponent of that distribution; 0 gives every class the same number of photos.
      validation_per_class: validation photos of every class.
      test_per_class: test photos of every class.
      image_size: side of the square photos in pixels.
      box_area: (low, high): share of the photo that the product's tight box covers; its logarithm
        is uniform over this range.
      clutter: 0 to 1, probability of a distractor product and amount of clutter shapes.
      informativeness: 0 to 1, probability that each informative word (brand, type, colour, pattern,
        mark, series) is in a title; otherwise a promotion word takes its position, or nothing.
      word_sharing: 0 to 1, share of the informative words that head and tail classes have in
        common; the others exist in one form for head classes and in another for tail classes. Of
        the informative vocabulary that is word_sharing / (2 - word_sharing). For experiments
        on how much of the gain from titles comes through shared words (docs/results/titles.md).
      seed: seed of the generator; another seed gives other products, for repeats over catalogues.
        The run's `seed` leaves the catalogue as it is.
      word_vectors: "word2vec" (trained on at most 10,000 training titles) or "random".
      word_vector_width: E, the width of the word vectors.

    Raises:
      ConfigError: a field outside its range.
    """

    num_classes: int = 100
    train_photos: int = 4000
    zipf_exponent: float = 1.0
    validation_per_class: int = 2
    test_per_class: int = 5
    image_size: int = 48
    box_area: tuple[float, float] = (0.3, 0.8)
    clutter: float = 0.5
    informativeness: float = 0.5
    word_sharing: float = 0.5
    seed: int = 0
    word_vectors: str = "word2vec"
    word_vector_width: int = 64

    def __post_init__(self) -> None:
        check = FieldChecks("data.generated", self)
        check.finite()
        check.positive("num_classes", "word_vector_width")
        if self.train_photos < self.num_classes:
            wanted = f"at least num_classes={self.num_classes}, one photo of each class"
            check.refuse("train_photos", wanted)
        if not 0 <= self.zipf_exponent < 10:
            check.refuse("zipf_exponent", "0 (all classes alike) up to 10")
        check.positive("validation_per_class", "test_per_class")
        if not 8 <= self.image_size <= 1024:
            check.refuse("image_size", "8 to 1024 pixels")
        if len(self.box_area) != 2 or not 0.01 <= self.box_area[0] <= self.box_area[1] <= 0.95:
            check.refuse("box_area", "(low, high) with 0.01 <= low <= high <= 0.95")
        check.share("clutter", "informativeness", "word_sharing")
        if not 0 <= self.seed < 2**63:
            check.refuse("seed", "0 to 2^63 - 1")
        check.choice("word_vectors", ("word2vec", "random"))


SOURCES = ("generated", "imported", "arrays")
TITLE_VARIANTS = ("raw", "masked", "shuffled", "shuffled_within_class", "none")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Selects the training records and how their titles are used: `data.*`.

    Attributes:
      source: "generated" (from `generated`), "imported" (a folder of `sicot import`) or "arrays" (a
        file of `sicot export-arrays`).
      path: folder or file of the catalogue, for "imported" and "arrays".
      generated: the catalogue of "generated".
      head_boundary: a class with more training photos belongs to the head; -1 uses the boundary
        of the catalogue.
      title: "raw", "masked" (words of SKU and category removed), "shuffled" (another photo's
        title), "shuffled_within_class" or "none".
      max_tokens: T, the words of a title that are read.
      sampling: "uniform", "class_balanced" or "square_root" (probability of a class proportional to
        the root of its photos).
      workers: processes that decode photos; 0 uses threads of the training process.
      on_device: keep all training photos in device memory and gather batches there, for "arrays".
        Set it where the photos fit and the host cannot decode quickly enough.
      triplets: a file of `sicot events triplets` (query photo, clicked product, skipped product) to
        train `loss.triplet` with, "" for none. Set it where click logs of a search exist.
      queries: folder of the query photos of `triplets` (`sicot serve --keep-queries`), "" where all
        of them are training photos.
      triplet_share: share of a batch's photos that come in triplets; the others are drawn as
        `sampling` says. Lower it where there are few triplets.

    Raises:
      ConfigError: a field outside its range, or fields that exclude each other.
    """

    source: str = "generated"
    path: str = ""
    generated: GeneratedSpec = dataclasses.field(default_factory=GeneratedSpec)
    head_boundary: int = -1
    title: str = "raw"
    max_tokens: int = 16
    sampling: str = "uniform"
    workers: int = 0
    on_device: bool = False
    triplets: str = ""
    queries: str = ""
    triplet_share: float = 0.5

    def __post_init__(self) -> None:
        check = FieldChecks("data", self)
        check.choice("source", SOURCES)
        check.choice("title", TITLE_VARIANTS)
        check.choice("sampling", SAMPLING_SCHEMES)
        check.positive("max_tokens")
        check.not_negative("workers")
        check.share("triplet_share", above_zero=True)
        if self.source != "generated" and not self.path:
            raise ConfigError(
                f"data.source={self.source!r} needs data.path; add --config.data.path=PATH "
                "(see sicot import)"
            )
        if self.on_device and self.source != "arrays":
            raise ConfigError(
                f"data.on_device with data.source={self.source!r}, whose photos differ in size; "
                "write an array file (sicot export-arrays) and set data.source=arrays"
            )
        if self.queries and not self.triplets:
            raise ConfigError(
                f"data.queries={self.queries!r} without data.triplets, which refers to these "
                "photos; set data.triplets"
            )
        if self.triplets and self.on_device:
            raise ConfigError(
                "data.triplets with data.on_device=True, which holds the catalogue's photos but no "
                "query photos; set data.on_device=False"
            )


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Sets the training augmentation, computed on the devices: `augment.*`.

    Attributes:
      enabled: False trains on the centre crop alone.
      min_area: smallest share of the photo that a random crop covers.
      max_ratio: largest aspect ratio of a random crop.
      flip: mirror half of the photos.
      random_erasing: share of the photos of which a random part is blanked, for the network that
        `loss.background_suppression` starts from (Zhong et al. 2020).

    Raises:
      ConfigError: a field outside its range.
    """

    enabled: bool = True
    min_area: float = 0.35
    max_ratio: float = 4 / 3
    flip: bool = True
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        check = FieldChecks("augment", self)
        check.finite()
        check.share("min_area", above_zero=True)
        if self.max_ratio < 1:
            check.refuse("max_ratio", "1 or more")
        check.share("random_erasing")
