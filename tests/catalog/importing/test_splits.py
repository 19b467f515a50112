from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.catalog.importing.splits import (
    SplitPhoto,
    SplitRules,
    assign_splits,
    held_out,
    order_key,
    split_sizes,
    tail_targets,
)


def photos_of(**classes):
    return [
        SplitPhoto(f"{label}{i}", label, f"{label}/{i}.jpg")
        for label, n in classes.items()
        for i in range(n)
    ]


def count(photos, assignment, label):
    return Counter(
        split for photo, split in zip(photos, assignment.split, strict=True) if photo.label == label
    )


@pytest.mark.parametrize(
    ("n", "train", "validation", "test"),
    [
        (1, 1, 0, 0),
        (2, 2, 0, 0),
        (3, 3, 0, 0),
        (4, 3, 0, 1),  # 3 are left: too few to hold one out
        (5, 3, 1, 1),
        (7, 5, 1, 1),
        (8, 5, 1, 2),
        (10, 6, 2, 2),
        (50, 32, 8, 10),
        (100, 64, 16, 20),
        (557, 517, 20, 20),
    ],
)
def test_share_rule_by_hand(n, train, validation, test):
    assert split_sizes(n) == (train, validation, test)


def test_held_out_bounds():
    for n in range(1, 300):
        train, validation, test = split_sizes(n)
        assert train >= 1
        assert train + validation + test == n
        assert test == held_out(n)
        assert (test >= 1) == (n >= 4)
        assert max(test, validation) <= 20


@pytest.mark.parametrize(
    ("n", "expected"),
    [(3, (3, 0, 0)), (5, (5, 0, 0)), (6, (1, 0, 5)), (9, (3, 1, 5)), (20, (12, 3, 5))],
)
def test_equal_test_sets(n, expected):
    assert split_sizes(n, test_per_class=5) == expected


@pytest.mark.parametrize(
    ("n", "expected"),
    [(3, (3, 0, 0)), (4, (3, 0, 1)), (10, (6, 2, 2)), (557, (426, 20, 111)), (1, (1, 0, 0))],
)
def test_test_sets_in_proportion(n, expected):
    """No upper limit for the test; validation as ever, of what is left."""
    assert split_sizes(n, test_share=0.2) == expected


def test_a_large_share_leaves_one_to_train():
    assert split_sizes(4, test_share=0.99) == (1, 0, 3)
    photos = photos_of(a=200, b=10)
    result = assign_splits(photos, SplitRules(seed=0, test_share=0.5))
    assert count(photos, result, "a")["test"] == 100
    assert count(photos, result, "b")["test"] == 5
    with pytest.raises(ValueError, match="test_share=1, wanted above 0 and below 1"):
        assign_splits(photos, SplitRules(seed=0, test_share=1))
    with pytest.raises(ValueError, match="test_share and test_per_class are both given; give one"):
        assign_splits(photos, SplitRules(seed=0, test_share=0.5, test_per_class=3))


def test_small_classes_are_trained_not_tested():
    photos = photos_of(a=3, b=4)
    result = assign_splits(photos, SplitRules(seed=0))
    assert count(photos, result, "a") == {"train": 3}
    assert count(photos, result, "b") == {"train": 3, "test": 1}
    assert result.small_classes == ["a"]
    assert result.untested_classes == []


def test_untested_classes_are_named():
    photos = photos_of(a=3, b=5, c=6)
    result = assign_splits(photos, SplitRules(seed=0, test_per_class=5))
    assert result.small_classes == ["a"]
    assert result.untested_classes == ["b"]
    assert count(photos, result, "c") == {"train": 1, "test": 5}


def test_row_order_does_not_matter_and_the_seed_does():
    photos = photos_of(a=30, b=11, c=2)
    expected = dict(
        zip(
            (p.image_id for p in photos),
            assign_splits(photos, SplitRules(seed=1)).split,
            strict=True,
        )
    )
    shuffled = photos[:]
    random.Random(0).shuffle(shuffled)
    assert (
        dict(
            zip(
                (p.image_id for p in shuffled),
                assign_splits(shuffled, SplitRules(seed=1)).split,
                strict=True,
            )
        )
        == expected
    )
    assert (
        assign_splits(photos, SplitRules(seed=2)).split
        != assign_splits(photos, SplitRules(seed=1)).split
    )


def test_another_class_does_not_change_a_class():
    alone = photos_of(a=30)
    assert (
        assign_splits(alone + photos_of(b=9), SplitRules(seed=0)).split[:30]
        == assign_splits(alone, SplitRules(seed=0)).split
    )


def test_split_in_the_source_wins():
    given = [SplitPhoto(f"x{i}", "x", f"{i}", "test" if i < 9 else "train") for i in range(10)]
    assert assign_splits(given, SplitRules(seed=0)).split == ["test"] * 9 + ["train"]
    mixed = [*given, *(SplitPhoto(f"f{i}", "x", f"f{i}") for i in range(5))]
    result = assign_splits(mixed, SplitRules(seed=0))
    assert result.split[:10] == ["test"] * 9 + ["train"]
    assert Counter(result.split[10:]) == {"train": 3, "validation": 1, "test": 1}


def test_surplus_copies_of_one_label_leave_one():
    photos = [SplitPhoto("same", "a", "2.jpg"), SplitPhoto("same", "a", "1.jpg"), *photos_of(a=4)]
    result = assign_splits(photos, SplitRules(seed=0))
    assert result.surplus == [0]
    assert result.split[0] == ""
    assert result.split[1] != ""
    assert result.conflicting == []


def test_a_copy_of_an_official_test_photo_leaves_train():
    photos = [
        SplitPhoto("same", "a", "1.jpg", "train"),
        SplitPhoto("same", "a", "2.jpg", "test"),
        SplitPhoto("x", "a", "3", "train"),
    ]
    result = assign_splits(photos, SplitRules(seed=0))
    assert result.split == ["", "test", "train"]
    assert result.surplus == [0]


def test_identical_photos_of_two_labels_are_trained_only_and_named():
    photos = [
        *photos_of(a=40, b=40),
        SplitPhoto("same", "a", "p.jpg", "test"),
        SplitPhoto("same", "b", "q.jpg", "test"),
    ]
    photos.append(SplitPhoto("same", "b", "r.jpg"))
    result = assign_splits(photos, SplitRules(seed=0))
    assert result.split[80:] == ["train", "train", ""]
    assert result.conflicting == [("same", [80, 81])]
    assert result.surplus == [82]
    for seed in range(5):  # never held out, whatever the order
        pinned = [SplitPhoto(p.image_id, p.label, p.reference) for p in photos]
        assert assign_splits(pinned, SplitRules(seed=seed)).split[80] == "train"


def test_no_photo_is_in_two_splits():
    generator = random.Random(0)
    photos = [
        SplitPhoto(str(generator.randrange(200)), generator.randrange(12), str(i))
        for i in range(600)
    ]
    result = assign_splits(photos, SplitRules(seed=3))
    where = {}
    for photo, split in zip(photos, result.split, strict=True):
        if split:
            assert where.setdefault(photo.image_id, split) == split
    kept = [(p.image_id, p.label) for p, split in zip(photos, result.split, strict=True) if split]
    assert len(kept) == len(set(kept))
    assert len(kept) + len(result.surplus) == 600


def test_tail_cut_leaves_validation_and_test():
    assert tail_targets([100, 100, 100, 100, 100], 16) == [16, 8, 4, 2, 1]
    assert tail_targets([3, 100, 5], 16) == [1, 16, 4]
    photos = photos_of(a=50, b=50, c=50)
    uncut, cut = (
        assign_splits(photos, SplitRules(seed=0)),
        assign_splits(photos, SplitRules(seed=0, tail_cut=9)),
    )
    assert [count(photos, cut, label)["train"] for label in "abc"] == [9, 3, 1]
    assert len(cut.tail_removed) == 3 * 32 - 13
    for before, after in zip(uncut.split, cut.split, strict=True):
        assert after == before or (before == "train" and after == "")


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="test_per_class=0"):
        assign_splits(photos_of(a=3), SplitRules(seed=0, test_per_class=0))
    with pytest.raises(ValueError, match="tail_cut=0"):
        assign_splits(photos_of(a=3), SplitRules(seed=0, tail_cut=0))


def test_order_key_is_fixed_for_ever():
    """A changed hash would move photos between train and test of catalogues that exist."""
    assert order_key(0, "a").hex() == "62cef9350db43c6159af201adbc0f168"


def test_a_later_version_keeps_the_split_of_every_photo():
    """Classes grow from 20 to 30 photos: nothing moves, the new photos fill up; without `previous`
    many would move.
    """
    old = photos_of(a=20, b=20, c=7, d=3)
    first = assign_splits(old, SplitRules(seed=0))
    previous = {photo.image_id: split for photo, split in zip(old, first.split, strict=True)}
    grown = photos_of(a=30, b=30, c=7, d=9)
    second = assign_splits(grown, SplitRules(seed=0), previous=previous)
    where = {photo.image_id: split for photo, split in zip(grown, second.split, strict=True)}
    assert {image: where[image] for image in previous} == previous
    assert second.unchanged == 50
    assert [count(grown, second, label) for label in "abcd"] == [
        {"train": 19, "validation": 5, "test": 6},
        {"train": 19, "validation": 5, "test": 6},
        {"train": 5, "validation": 1, "test": 1},
        {"train": 6, "validation": 1, "test": 2},
    ]
    anew = assign_splits(grown, SplitRules(seed=0))
    assert any(
        previous.get(p.image_id, "test") != "test"
        for p, s in zip(grown, anew.split, strict=True)
        if s == "test"
    )


def test_a_photo_kept_in_test_never_leaves_a_class_without_train():
    photos = photos_of(a=4)
    result = assign_splits(
        photos,
        SplitRules(seed=0),
        previous={"a0": "validation", "a1": "validation", "a2": "validation"},
    )
    assert result.split == ["validation"] * 3 + ["train"]
    given = [SplitPhoto("x", "a", "x", "test"), *photos_of(a=1)]
    assert assign_splits(
        given, SplitRules(seed=0), previous={"x": "train", "a0": "test"}
    ).split == [
        "test",
        "test",
    ]


def test_equal_test_sets_count_source_test_photos_and_only_those_that_may_be_tested():
    """Each class with another number of test photos than wanted is named."""
    pinned = [
        SplitPhoto(f"same{i}", label, f"{label}{i}") for i in range(4) for label in ("a", "z")
    ]
    given = [
        SplitPhoto(f"g{label}{i}", label, str(i), "test")
        for label, n in [("c", 5), ("d", 2)]
        for i in range(n)
    ]
    photos = [*photos_of(a=3, z=30, c=10, d=10), *pinned, *given]
    five = assign_splits(photos, SplitRules(seed=0, test_per_class=5))
    assert [count(photos, five, label)["test"] for label in "azcd"] == [0, 5, 5, 5]
    assert five.untested_classes == ["a"]
    assert not five.uneven_classes
    assert not five.small_classes
    assert count(photos, five, "a") == {"train": 7}
    three = assign_splits(photos, SplitRules(seed=0, test_per_class=3))
    assert [count(photos, three, label)["test"] for label in "azcd"] == [3, 3, 5, 3]
    assert three.uneven_classes == ["c"]
    assert not three.untested_classes
    assert assign_splits(pinned, SplitRules(seed=0)).untested_classes == ["a", "z"]


def test_an_official_test_split_is_kept_and_validation_held_out():
    """Ten photos of a class plus three test photos; of a class without a test photo
    none is held out.
    """
    given = [SplitPhoto(f"t{i}", "a", f"t/{i}.jpg", "test") for i in range(3)]
    photos = photos_of(a=10, b=10) + given
    result = assign_splits(photos, SplitRules(seed=0, official_test=True))
    assert count(photos, result, "a") == {"train": 8, "validation": held_out(10), "test": 3}
    assert count(photos, result, "b") == {"train": 10}
    assert result.untested_classes == ["b"]
    # The photos that the share rule orders first; more of them later leave the split of the first
    # as it was.
    order = sorted((p.image_id for p in photos_of(a=10)), key=lambda image: order_key(0, image))
    split = {p.image_id: s for p, s in zip(photos, result.split, strict=True)}
    assert [image for image in order if split[image] == "validation"] == order[:2]
    grown = photos_of(a=30) + given
    later = assign_splits(grown, SplitRules(seed=0, official_test=True), previous=split)
    assert count(grown, later, "a") == {"train": 24, "validation": held_out(30), "test": 3}
    assert [s for p, s in zip(grown, later.split, strict=True) if p.image_id in order] == [
        split[f"a{i}"] for i in range(10)
    ]


def test_near_identical_photos_count_as_one_and_stay_together():
    """Five pictures of four sizes each: one picture is tested, one validated, three trained."""
    photos = [
        SplitPhoto(f"{picture} {size}", "a", f"{picture}-{size}.jpg", copies=picture)
        for picture in range(5)
        for size in range(4)
    ]
    result = assign_splits(photos, SplitRules(seed=0))
    assert count(photos, result, "a") == {"train": 12, "validation": 4, "test": 4}
    for picture in range(5):
        assert len(set(result.split[4 * picture : 4 * picture + 4])) == 1
    assert (result.near_copies, result.divided) == (15, [])
    # Without the copies the pictures have the same number in each split.
    assert split_sizes(5) == (3, 1, 1)
    # All of one picture: nothing is left to test with.
    one = [SplitPhoto(f"{i}", "a", f"{i}", copies=0) for i in range(9)]
    result = assign_splits(one, SplitRules(seed=0))
    assert result.split == ["train"] * 9
    assert result.untested_classes == ["a"]


def test_a_new_copy_joins_the_split_of_its_picture():
    photos = [
        SplitPhoto("test", "a", "1", "test", copies=1),
        SplitPhoto("new", "a", "2", copies=1),
        SplitPhoto("earlier", "a", "3", copies=2),
        SplitPhoto("newer", "a", "4", copies=2),
        SplitPhoto("trained", "a", "5", "train", copies=3),
        SplitPhoto("tested", "a", "6", "test", copies=3),
        SplitPhoto("newest", "a", "7", copies=3),
    ]
    result = assign_splits(photos, SplitRules(seed=0), previous={"earlier": "validation"})
    expected = ["test", "test", "validation", "validation", "train", "test", "train"]
    assert result.split == expected
    assert result.divided == [[4, 5, 6]]
    # Copies of one picture under two labels are two pictures.
    others = [SplitPhoto("x", "a", "1", copies=1), SplitPhoto("y", "b", "2", copies=1)]
    assert assign_splits(others, SplitRules(seed=0)).near_copies == 0


LABELS = st.sampled_from("abc")
# Few image ids, so that many photos are copies of each other, under one label or several.
PHOTOS = st.lists(
    st.tuples(
        st.integers(0, 60),
        LABELS,
        st.sampled_from(("", "", "", "train", "validation", "test")),
        st.booleans(),
    ),
    max_size=60,
).map(
    # Some images are near-identical to two others.
    lambda rows: [
        SplitPhoto(
            f"image {image}",
            label,
            f"{position}.jpg",
            source_split,
            image // 3 if image % 9 < 3 and has_copies else None,
        )
        for position, (image, label, source_split, has_copies) in enumerate(rows)
    ]
)
UNPINNED_PHOTOS = PHOTOS.map(
    lambda photos: [dataclasses.replace(photo, source_split="") for photo in photos]
)
RULES = st.builds(
    lambda seed, sizes, tail_cut, official_test: SplitRules(
        seed, **sizes, tail_cut=tail_cut, official_test=official_test
    ),
    st.integers(0, 2**32),
    st.just({})
    | st.builds(dict, test_per_class=st.integers(1, 6))
    | st.builds(dict, test_share=st.floats(0.05, 0.95)),
    st.none() | st.integers(1, 20),
    st.booleans(),
)


def by_reference(photos, assignment):
    return {p.reference: split for p, split in zip(photos, assignment.split, strict=True)}


@given(PHOTOS, RULES)
def test_every_photo_has_one_split_or_is_reported(photos, rules):
    result = assign_splits(photos, rules)
    assert set(result.split) <= {"train", "validation", "test", ""}
    dropped = [*result.surplus, *result.tail_removed]
    assert sorted(dropped) == [i for i, split in enumerate(result.split) if not split]
    for i in result.surplus:  # another photo of the same pixels and label stays
        stays = [
            j
            for j, photo in enumerate(photos)
            if j not in result.surplus
            and (photo.image_id, photo.label) == (photos[i].image_id, photos[i].label)
        ]
        assert len(stays) == 1
    for image_id, group in result.conflicting:
        assert {photos[i].image_id for i in group} == {image_id}
        assert len({photos[i].label for i in group}) == len(group) > 1


@given(PHOTOS, RULES)
def test_copies_of_a_photo_never_lie_in_two_splits(photos, rules):
    result = assign_splits(photos, rules)
    splits = {}
    for photo, split in zip(photos, result.split, strict=True):
        if split:
            splits.setdefault(photo.image_id, set()).add(split)
    assert all(len(of_one) == 1 for of_one in splits.values())
    for image_id, _ in result.conflicting:
        assert splits.get(image_id, {"train"}) == {"train"}


@given(UNPINNED_PHOTOS, RULES)
def test_near_identical_photos_of_a_label_never_lie_in_two_splits(photos, rules):
    result = assign_splits(photos, rules)
    assert not result.divided
    splits = {}
    for photo, split in zip(photos, result.split, strict=True):
        if split:
            splits.setdefault(photo.picture, set()).add(split)
    assert all(len(of_one) == 1 for of_one in splits.values())


@given(PHOTOS, RULES, st.randoms(use_true_random=False))
def test_the_order_of_photos_does_not_matter(photos, rules, random):
    shuffled = random.sample(photos, len(photos))
    one, other = assign_splits(photos, rules), assign_splits(shuffled, rules)
    assert by_reference(photos, one) == by_reference(shuffled, other)
    for field in ("small_classes", "untested_classes", "uneven_classes", "unchanged"):
        assert getattr(one, field) == getattr(other, field)
    assert [image for image, _ in one.conflicting] == [image for image, _ in other.conflicting]


@given(PHOTOS, PHOTOS, RULES)
def test_an_earlier_assignment_is_kept(photos, later, rules):
    """Except for what the source says, for photos that are now under two labels, and for the tail.

    The references of later photos sort behind those of earlier ones.
    """
    first = assign_splits(photos, rules)
    previous = {p.image_id: s for p, s in zip(photos, first.split, strict=True) if s}
    grown = photos + [
        SplitPhoto(p.image_id, p.label, f"later {p.reference}", p.source_split) for p in later
    ]
    second = assign_splits(grown, rules, previous)
    free = set(range(len(grown))) - {*second.surplus, *second.tail_removed}
    free -= {i for _, group in second.conflicting for i in group}
    for i in free:
        if not grown[i].source_split and grown[i].image_id in previous:
            assert second.split[i] == previous[grown[i].image_id]


@given(UNPINNED_PHOTOS, RULES)
def test_every_class_is_trained(photos, rules):
    result = assign_splits(photos, rules)
    trained = {p.label for p, s in zip(photos, result.split, strict=True) if s == "train"}
    assert trained == {photo.label for photo in photos}
