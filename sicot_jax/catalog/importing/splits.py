"""Which photo is trained, validated and tested: pure functions of the photos and a seed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

MIN_TESTED = 4
MAX_HELD_OUT = 20

# Of identical copies the most held-out one stays: dropping it from train keeps an official test set
# whole.
_HELD_OUT_FIRST = {"test": 0, "validation": 1, "train": 2, "": 3}


@dataclasses.dataclass(frozen=True, slots=True)
class Photo:
    """What the split of a photo may depend on. `given` is the split named by the source, or empty."""

    image_id: str
    label: Hashable
    reference: str
    given: str = ""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """`split[i]` of photo i, empty where the photo is a surplus copy; and what the report names."""

    split: list[str]
    surplus: list[int]  # photos dropped because another of the same label is identical
    conflicting: list[
        tuple[str, list[int]]
    ]  # image_id -> the photos kept of it, under two labels or more
    small_classes: list[Hashable]  # under MIN_TESTED photos: trained, not tested
    untested_classes: list[Hashable]  # MIN_TESTED photos or more, but too few that may be tested
    uneven_classes: list[Hashable]  # tested with another number of photos than `test_per_class`
    cut: list[int]  # train photos removed by `tail_cut`
    settled: int  # photos kept that have the split of `previous`


def order_key(seed: int, image_id: str, *salt: str) -> bytes:
    """Hash by which photos are ordered: it depends on the seed and the photo, on nothing else."""
    text = "\0".join((str(seed), image_id, *salt))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def held_out(n: int) -> int:
    """Photos held out of n: 0 for n < 4, otherwise min(20, round(0.2 n)) and at least 1."""
    if n < MIN_TESTED:
        return 0
    return max(1, min(MAX_HELD_OUT, round(0.2 * n)))


def split_sizes(
    n: int, *, test_per_class: int | None = None, test_share: float | None = None
) -> tuple[int, int, int]:
    """(train, validation, test) of a class of n photos; train >= 1 for n >= 1.

    test = held_out(n), validation = held_out(n - test). With `test_per_class=K` test sets are
    equal: K where n >= max(4, K + 1), otherwise 0 (a smaller test set would weigh classes
    unequally). With `test_share=S` they are in proportion, max(1, round(S n)) for n >= 4 with no
    upper limit: more test photos of the head.
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
    """Train photos each class keeps under an exponential tail from `largest` down to 1.

    The class of rank r of C (by count descending, then position) keeps min(count, round(largest **
    (1 - r / (C - 1)))).
    """
    targets = [0] * len(counts)
    ranked = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    for rank, c in enumerate(ranked):
        targets[c] = min(counts[c], round(largest ** (1 - rank / max(1, len(counts) - 1))))
    return targets


def assign_splits(
    photos: Sequence[Photo],
    *,
    seed: int,
    test_per_class: int | None = None,
    test_share: float | None = None,
    tail_cut: int | None = None,
    official_test: bool = False,
    previous: Mapping[str, str] | None = None,
) -> Assignment:
    """Split of every photo; depends on neither the order of `photos` nor on how they were read.

    1. Identical photos (same image_id) of one label: one stays (the most held-out `given`, then the
    smallest
       reference), the others are surplus.
    2. Identical photos of several labels: one per label stays, all in train. 3. A `given` split
    wins for every other photo; without one, the split that `previous` names for its image_id: what
       an earlier version trained on is never tested on.
    4. Each class's n photos without a given split (those of rule 2 included) aim at
    `split_sizes(n)`: the new ones fill
       what is missing, test first, in the order of `order_key`, and leave at least one for train.
       With `test_per_class` given test photos count too, and a class that cannot reach it gets no
       new one. With `official_test` no photo is tested but the given ones, and validation =
       held_out(n) of a class that is tested.
    5. `tail_cut` removes train photos down to `tail_targets`, the last in the order of `order_key`
    first; classes
       are ranked by (count, label).
    """
    if test_per_class is not None and test_per_class < 1:
        raise ValueError(
            f"test_per_class={test_per_class}, wanted at least 1; leave it out for the share rule"
        )
    if test_share is not None and not 0 < test_share < 1:
        raise ValueError(
            f"test_share={test_share}, wanted above 0 and below 1; leave it out for at most 20 a class"
        )
    if test_share is not None and test_per_class is not None:
        raise ValueError("test_share and test_per_class are both given; give one")
    if tail_cut is not None and tail_cut < 1:
        raise ValueError(
            f"tail_cut={tail_cut}, wanted the largest class's train photos, at least 1"
        )
    previous = previous or {}
    kept, surplus = _drop_copies(photos)
    labels_of: defaultdict[str, list[int]] = defaultdict(list)
    for i in kept:
        labels_of[photos[i].image_id].append(i)
    conflicting = sorted(
        (image, sorted(group)) for image, group in labels_of.items() if len(group) > 1
    )
    pinned = {i for _, group in conflicting for i in group}

    split = [""] * len(photos)
    classes: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i in kept:
        classes[photos[i].label].append(i)
    small: list[Hashable] = []
    untested: list[Hashable] = []
    uneven: list[Hashable] = []
    for label, members in sorted(classes.items(), key=lambda item: str(item[0])):
        members.sort(key=lambda i: order_key(seed, photos[i].image_id))
        for i in members:
            split[i] = (
                "train" if i in pinned else photos[i].given or previous.get(photos[i].image_id, "")
            )
        _fill(photos, members, split, pinned, test_per_class, test_share, official_test)
        tested = sum(split[i] == "test" for i in members)
        if not tested and (test_per_class is not None or not any(photos[i].given for i in members)):
            (small if len(members) < MIN_TESTED else untested).append(label)
        elif test_per_class is not None and tested != test_per_class:
            uneven.append(label)

    cut = _cut_tail(photos, classes, split, tail_cut) if tail_cut is not None else []
    for i in cut:
        split[i] = ""
    settled = sum(previous.get(photos[i].image_id) == split[i] for i in kept)
    return Assignment(
        split, sorted(surplus), conflicting, small, untested, uneven, sorted(cut), settled
    )


def _fill(
    photos: Sequence[Photo],
    members: Sequence[int],
    split: list[str],
    pinned: set[int],
    test_per_class: int | None,
    test_share: float | None,
    official_test: bool,
) -> None:
    """Rule 4 for one class: give every member without a split one."""
    free = [i for i in members if not split[i]]
    counted = [
        i
        for i in members
        if i in pinned
        or not photos[i].given
        or (test_per_class is not None and photos[i].given == "test")
    ]
    have = Counter(split[i] for i in counted)
    _, validation, test = split_sizes(
        len(counted), test_per_class=test_per_class, test_share=test_share
    )
    if official_test:
        test = 0
        validation = held_out(len(counted)) if any(split[i] == "test" for i in members) else 0
    spare = max(0, len(free) - (have["train"] == 0))
    test = max(0, test - have["test"])
    if test > spare:
        test = spare if test_per_class is None else 0
    validation = (
        max(0, validation - have["validation"]) if official_test or test + have["test"] else 0
    )
    validation = min(validation, spare - test)
    for position, i in enumerate(free):
        held = "test" if position < test else "validation"
        split[i] = held if position < test + validation else "train"


def _drop_copies(photos: Sequence[Photo]) -> tuple[list[int], list[int]]:
    copies: defaultdict[tuple[str, Hashable], list[int]] = defaultdict(list)
    for i, photo in enumerate(photos):
        copies[photo.image_id, photo.label].append(i)
    kept, surplus = [], []
    for group in copies.values():
        first, *others = sorted(
            group, key=lambda i: (_HELD_OUT_FIRST[photos[i].given], photos[i].reference)
        )
        kept.append(first)
        surplus += others
    return kept, surplus


def _cut_tail(
    photos: Sequence[Photo], classes: dict[Hashable, list[int]], split: Sequence[str], largest: int
) -> list[int]:
    labels = sorted(classes, key=str)
    train = [[i for i in classes[label] if split[i] == "train"] for label in labels]
    targets = tail_targets([len(members) for members in train], largest)
    return [i for members, target in zip(train, targets, strict=True) for i in members[target:]]
