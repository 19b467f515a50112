"""Specification of a generated catalogue (`data.generated.*`)."""

from __future__ import annotations

import dataclasses

from sicot_jax.config.checks import FieldChecks


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
        the whole informative vocabulary that is word_sharing / (2 - word_sharing). For experiments
        on how much of the gain from titles comes through shared words (docs/results.md).
      seed: of the generator; another seed gives other products, for repeats over catalogues. The
        run's own `seed` leaves the catalogue as it is.
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
