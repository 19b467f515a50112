"""Assigns photos to train, validation and test: pure functions of the photos and a seed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

MIN_TESTED = 4  # a class with fewer photos is trained, not tested
MAX_HELD_OUT = 20

# Of identical copies the most held-out one stays: dropping it from train keeps an official test set
# complete.
_HELD_OUT_FIRST = {"test": 0, "validation": 1, "train": 2, "": 3}
# The split that further near-identical photos join, where earlier ones lie in several.
_JOINED_FIRST = ("train", "test", "validation")


@dataclasses.dataclass(frozen=True, slots=True)
class SplitPhoto:
    """What the split of a photo may depend on.

    Attributes:
      image_id: hash of the pixels; identical photos have the same one.
      label: class of the photo.
      reference: path of the photo in the source.
      source_split: the split named by the source, or empty.
      copies: near-identical photos of one label have the same; None is a photo without any.
    """

    image_id: str
    label: Hashable
    reference: str
    source_split: str = ""
    copies: Hashable = None

    @property
    def picture(self) -> Hashable:
        """What the photo shows: near-identical photos of one label have the same."""
        return (self.image_id, self.label) if self.copies is None else (self.copies, self.label)


@dataclasses.dataclass(frozen=True)
class SplitRules:
    """How photos without a split in the source are divided.

    Attributes:
      seed: seed of the order in which photos are chosen.
      test_per_class: number of test photos of every class that has enough of them.
      test_share: share of every class's photos to test.
      tail_cut: training photos of the largest class under an exponential tail; None keeps all.
      official_test: the source names all test photos; only validation is held out of the others.

    Raises:
      ValueError: a value outside its range, or both test sizes.
    """

    seed: int
    test_per_class: int | None = None
    test_share: float | None = None
    tail_cut: int | None = None
    official_test: bool = False

    def __post_init__(self) -> None:
        if self.test_per_class is not None and self.test_per_class < 1:
            raise ValueError(
                f"test_per_class={self.test_per_class}, wanted at least 1; "
                "leave it out for the share rule"
            )
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise ValueError(
                f"test_share={self.test_share}, wanted above 0 and below 1; "
                "leave it out for at most 20 a class"
            )
        if self.test_share is not None and self.test_per_class is not None:
            raise ValueError("test_share and test_per_class are both given; give one")
        if self.tail_cut is not None and self.tail_cut < 1:
            raise ValueError(
                f"tail_cut={self.tail_cut}, wanted the largest class's train photos, at least 1"
            )


@dataclasses.dataclass(frozen=True)
class SplitAssignment:
    """The split of every photo, and what an import report names.

    Attributes:
      split: split of photo i, empty where the photo is dropped.
      surplus: indices of photos dropped because another of the same label is identical.
      conflicting: (image_id, indices of the photos kept of it) under two labels or more.
      near_copies: number of photos with a near-identical one of the same label, but for one each.
      divided: indices of near-identical photos that are trained on and tested with, by picture: the
        source or an earlier version says so.
      small_classes: labels with fewer than MIN_TESTED photos: trained, not tested.
      untested_classes: labels with enough photos, but too few that may be tested.
      uneven_classes: labels tested with another number of photos than `test_per_class`.
      tail_removed: indices of train photos removed by `tail_cut`.
      unchanged: number of photos that have the split of the previous version.
    """

    split: list[str]
    surplus: list[int]
    conflicting: list[tuple[str, list[int]]]
    near_copies: int
    divided: list[list[int]]
    small_classes: list[Hashable]
    untested_classes: list[Hashable]
    uneven_classes: list[Hashable]
    tail_removed: list[int]
    unchanged: int


def order_key(seed: int, image_id: str, *salt: str) -> bytes:
    """Returns the hash by which photos are ordered; it depends on the arguments alone.

    Args:
      seed: seed of the import.
      image_id: hash of the photo's pixels.
      *salt: words that give an independent order.

    Returns:
      16 bytes (blake2b).
    """
    text = "\0".join((str(seed), image_id, *salt))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def held_out(n: int) -> int:
    """Returns how many of n photos are held out: 0 for n < 4, else 20 % and 1 to 20.

    Args:
      n: number of photos.

    Returns:
      Number of photos, min(20, round(0.2 n)) and at least 1 for n >= 4.
    """
    if n < MIN_TESTED:
        return 0
    return max(1, min(MAX_HELD_OUT, round(0.2 * n)))


def split_sizes(
    n: int, *, test_per_class: int | None = None, test_share: float | None = None
) -> tuple[int, int, int]:
    """Returns the split sizes of a class of n photos.

    By default test = held_out(n) and validation = held_out(n - test).

    Args:
      n: number of photos of the class.
      test_per_class: equal test sets of this size K for classes with n >= max(4, K + 1), otherwise
        none (a smaller test set would weigh classes unequally).
      test_share: test sets in proportion, max(1, round(S n)) for n >= 4 with no upper limit.

    Returns:
      (train, validation, test); train >= 1 for n >= 1.
    """
    test = held_out(n)
    if test_per_class is not None:
        test = test_per_class if n >= max(MIN_TESTED, test_per_class + 1) else 0
    elif test_share is not None:
        test = min(max(1, round(test_share * n)), n - 1) if n >= MIN_TESTED else 0
    # A class that is not tested gives no photo to validation either: it is too small to be chosen
    # on.
    validation = held_out(n - test) if test else 0
    return n - test - validation, validation, test


def tail_targets(counts: Sequence[int], largest: int) -> list[int]:
    """Returns the train photos each class keeps under an exponential tail from `largest` to 1.

    The class of rank r of C (by descending count, then position) keeps
    min(count, round(largest ** (1 - r / (C - 1)))).

    Args:
      counts: train photos of C classes.
      largest: train photos of the largest class.

    Returns:
      C numbers.
    """
    targets = [0] * len(counts)
    ranked = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    for rank, c in enumerate(ranked):
        targets[c] = min(counts[c], round(largest ** (1 - rank / max(1, len(counts) - 1))))
    return targets


def assign_splits(
    photos: Sequence[SplitPhoto], rules: SplitRules, previous: Mapping[str, str] | None = None
) -> SplitAssignment:
    """Returns the split of every photo; it does not depend on the order of the photos.

    1. Identical photos (same image_id) of one label: one stays (the most held-out source split,
       then the smallest reference), the others are surplus.
    2. Identical photos of several labels: one per label stays, all in train.
    3. The split in the source wins for every other photo; without one, the split of the previous
       version: what an earlier version trained on is never tested on.
    4. Each class's n photos without a split in the source (those of rule 2 included) aim at
       `split_sizes(n)`: new photos fill what is missing, test first, in the order of `order_key`,
       and leave at least one for train. With `test_per_class` the source's test photos count too,
       and a class that cannot reach it gets no new one. With `official_test` no photo is tested
       but the source's, and validation = held_out(n) of a class that is tested. Near-identical
       photos count as one and get one split; those with fewer copies are held out first.
    5. `tail_cut` removes train photos down to `tail_targets`, the last in the order of `order_key`
       first; classes are ranked by (count, label).

    Args:
      photos: N photos.
      rules: sizes and seed.
      previous: image_id -> split of an earlier version of the catalogue.

    Returns:
      The assignment of N photos.
    """
    previous = previous or {}
    kept, surplus = _drop_copies(photos)
    conflicting = _conflicting(photos, kept)
    train_only = {i for _, group in conflicting for i in group}
    split = [""] * len(photos)
    classes: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i in kept:
        classes[photos[i].label].append(i)
    small: list[Hashable] = []
    untested: list[Hashable] = []
    uneven: list[Hashable] = []
    for label, members in sorted(classes.items(), key=lambda item: str(item[0])):
        members.sort(key=lambda i: order_key(rules.seed, photos[i].image_id))
        for i in members:
            split[i] = photos[i].source_split or previous.get(photos[i].image_id, "")
            if i in train_only:
                split[i] = "train"
        _fill_class(photos, members, split, train_only, rules)
        tested = sum(split[i] == "test" for i in members)
        chosen_here = rules.test_per_class is not None or not any(
            photos[i].source_split for i in members
        )
        if not tested and chosen_here:
            (small if len(members) < MIN_TESTED else untested).append(label)
        elif rules.test_per_class is not None and tested != rules.test_per_class:
            uneven.append(label)
    removed = _tail_removed(classes, split, rules.tail_cut)
    for i in removed:
        split[i] = ""
    pictures = _pictures(photos, kept)
    return SplitAssignment(
        split=split,
        surplus=sorted(surplus),
        conflicting=conflicting,
        near_copies=len(kept) - len(pictures),
        divided=[
            sorted(group)
            for group in pictures.values()
            if len({split[i] for i in group if split[i]}) > 1
        ],
        small_classes=small,
        untested_classes=untested,
        uneven_classes=uneven,
        tail_removed=sorted(removed),
        unchanged=sum(previous.get(photos[i].image_id) == split[i] for i in kept),
    )


def _pictures(photos: Sequence[SplitPhoto], kept: Sequence[int]) -> dict[Hashable, list[int]]:
    pictures: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i in sorted(kept, key=lambda i: photos[i].reference):
        pictures[photos[i].picture].append(i)
    return pictures


def _conflicting(photos: Sequence[SplitPhoto], kept: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Returns identical photos of several labels."""
    copies: defaultdict[str, list[int]] = defaultdict(list)
    for i in kept:
        copies[photos[i].image_id].append(i)
    return sorted((image, sorted(group)) for image, group in copies.items() if len(group) > 1)


def _fill_class(
    photos: Sequence[SplitPhoto],
    members: Sequence[int],
    split: list[str],
    train_only: set[int],
    rules: SplitRules,
) -> None:
    """Applies rule 4 to one class: gives every member without a split one."""
    placed: dict[Hashable, str] = {}  # by picture
    for i in sorted((i for i in members if split[i]), key=lambda i: _JOINED_FIRST.index(split[i])):
        placed.setdefault(photos[i].picture, split[i])
    eligible = dict.fromkeys(
        photos[i].picture
        for i in members
        if i in train_only
        or not photos[i].source_split
        or (rules.test_per_class is not None and photos[i].source_split == "test")
    )
    copies = Counter(photos[i].picture for i in members)
    # A picture with many copies would weigh as much in the test as many pictures.
    free = sorted((p for p in eligible if p not in placed), key=copies.__getitem__)
    have = Counter(placed.get(picture, "") for picture in eligible)
    _, validation, test = split_sizes(
        len(eligible), test_per_class=rules.test_per_class, test_share=rules.test_share
    )
    if rules.official_test:
        test = 0
        tested = any(split[i] == "test" for i in members)
        validation = held_out(len(eligible)) if tested else 0
    spare = max(0, len(free) - (have["train"] == 0))
    test = max(0, test - have["test"])
    if test > spare:
        test = spare if rules.test_per_class is None else 0
    if rules.official_test or test + have["test"]:
        validation = max(0, validation - have["validation"])
    else:
        validation = 0
    validation = min(validation, spare - test)
    for position, picture in enumerate(free):
        held = "test" if position < test else "validation"
        placed[picture] = held if position < test + validation else "train"
    for i in members:
        split[i] = split[i] or placed[photos[i].picture]


def _drop_copies(photos: Sequence[SplitPhoto]) -> tuple[list[int], list[int]]:
    copies: defaultdict[tuple[str, Hashable], list[int]] = defaultdict(list)
    for i, photo in enumerate(photos):
        copies[photo.image_id, photo.label].append(i)
    kept, surplus = [], []
    for group in copies.values():
        first, *others = sorted(
            group, key=lambda i: (_HELD_OUT_FIRST[photos[i].source_split], photos[i].reference)
        )
        kept.append(first)
        surplus += others
    return kept, surplus


def _tail_removed(
    classes: Mapping[Hashable, list[int]],
    split: Sequence[str],
    largest: int | None,
) -> list[int]:
    """Returns the train photos that rule 5 removes; `classes` are in the order of `order_key`."""
    if largest is None:
        return []
    labels = sorted(classes, key=str)
    train = [[i for i in classes[label] if split[i] == "train"] for label in labels]
    targets = tail_targets([len(members) for members in train], largest)
    return [i for members, target in zip(train, targets, strict=True) for i in members[target:]]
