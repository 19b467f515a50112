"""Config sections of the input: records, titles and augmentation."""

from __future__ import annotations

import dataclasses

from sicot_jax.config.batch_plan import SAMPLING_SCHEMES
from sicot_jax.config.checks import ConfigError, FieldChecks
from sicot_jax.config.generated_spec import GeneratedSpec

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
      head_boundary: a class with more training photos belongs to the head; -1 uses the catalogue's
        own boundary.
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
