"""Sample order: a permutation each epoch, pure in (seed, step), and the frequencies that the
samplings promise.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.catalog.sampling import (
    CLASS_STREAM,
    ORDER_STREAM,
    TRIPLET_STREAM,
    RecordSampler,
    permute,
    random_stream,
)
from sicot_jax.config.batch_plan import SAMPLING_SCHEMES, BatchPlan


def permutation(size, seed=0, epoch=0):
    return permute(np.arange(size), size=size, seed=seed, epoch=epoch)


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_permute_is_a_bijection(size, seed, epoch):
    np.testing.assert_array_equal(np.sort(permutation(size, seed, epoch)), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 4096, 4097])
def test_permute_is_a_permutation(size):
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**40, 3)]:
        order = permutation(size, seed, epoch)
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_permute_differs_between_epochs_and_seeds():
    orders = [permutation(1000, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, one in enumerate(orders):
        # A random permutation has one fixed point on average, and two agree at one index;
        # more than 10 of either is less than one chance in 10^7.
        assert (one == np.arange(1000)).sum() <= 10
        for other in orders[:i]:
            assert (one == other).sum() <= 10


def test_permute_is_evaluated_index_by_index():
    index = np.array([999_999, 0, 500_000])
    several = permute(index, size=1_000_000, seed=3, epoch=2)
    alone = [permute(index[i : i + 1], size=1_000_000, seed=3, epoch=2)[0] for i in range(3)]
    np.testing.assert_array_equal(several, alone)
    np.testing.assert_array_equal(index, [999_999, 0, 500_000])  # the argument is left alone


def test_permute_sends_a_record_everywhere_alike():
    """Where record 1 of 5 lands over 2,000 epochs: 400 each; chi-square with 4 degrees of freedom,
    23.5 is p = 1e-4.
    """
    landed = [permute(np.array([1]), size=5, seed=0, epoch=epoch)[0] for epoch in range(2000)]
    counts = np.bincount(landed, minlength=5)
    assert ((counts - 400) ** 2 / 400).sum() < 23.5


def test_equal_numbers_give_other_streams_for_other_purposes():
    streams = [
        random_stream(purpose, 3, 5).random(1000) for purpose in (ORDER_STREAM, CLASS_STREAM)
    ]
    assert len(np.unique(streams)) == 2000
    np.testing.assert_array_equal(random_stream(CLASS_STREAM, 3, 5).random(1000), streams[1])


def test_streams_are_those_that_numpy_keeps(monkeypatch):
    """A run resumed under another version of NumPy reads the photos in the same order."""

    def refuse(*args):
        pytest.fail("a stream that NumPy does not promise to keep (NEP 19)")

    monkeypatch.setattr(np.random, "Generator", refuse)
    order = permute(np.arange(8), size=1000, seed=3, epoch=5)
    assert order.tolist() == [724, 24, 495, 207, 14, 368, 646, 561]
    sampler = RecordSampler(np.arange(100) % 7, 8, seed=3, sampling="class_balanced")
    assert sampler(5).tolist() == [52, 60, 53, 72, 11, 13, 22, 49]
    draws = random_stream(TRIPLET_STREAM, 3, 5).random(4)
    assert (draws * 1000).astype(int).tolist() == [882, 689, 528, 697]


def test_permute_leaves_no_runs():
    """Neighbours before are no neighbours after: their distance is as in a random order (a third of
    the size).
    """
    distance = np.abs(np.diff(permutation(10_000)))
    assert (
        abs(distance.mean() / 10_000 - 1 / 3) < 0.01
    )  # deviation of the mean: 0.24 / sqrt(10,000)


@pytest.mark.parametrize(("records", "batch"), [(10, 4), (7, 7), (5, 8), (3, 10), (1, 4), (100, 1)])
def test_uniform_takes_every_record_once_an_epoch(records, batch):
    """Also where steps do not divide the epoch and where a batch holds several epochs."""
    sampler = RecordSampler(np.zeros(records, np.int32), batch, seed=5)
    epochs = 4
    steps = -(-epochs * records // batch)
    drawn = np.concatenate([sampler(step) for step in range(steps)])
    rounds = drawn[: epochs * records].reshape(epochs, records)
    np.testing.assert_array_equal(np.sort(rounds, 1), np.tile(np.arange(records), (epochs, 1)))
    if records > 6:
        assert not (rounds[0] == rounds[1]).all()


@given(
    st.integers(1, 100),
    st.integers(1, 40),
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(0, 6), max_size=2).map(lambda steps: tuple(sorted(steps))),
)
def test_uniform_takes_every_record_once_an_epoch_under_any_plan(records, batch, seed, doubled_at):
    sampler = RecordSampler(np.zeros(records, np.int32), batch, seed, doubled_at=doubled_at)
    drawn = [sampler(step) for step in range(10)]
    assert [len(taken) for taken in drawn] == [sampler.plan.size(step) for step in range(10)]
    order = np.concatenate(drawn)
    for start in range(0, len(order), records):
        epoch = np.sort(order[start : start + records])
        complete = len(epoch) == records
        np.testing.assert_array_equal(epoch, np.arange(records) if complete else np.unique(epoch))


def test_uniform_takes_every_record_once_an_epoch_while_the_batch_grows():
    """11 records in batches of 2, doubled after epochs 1 and 2 to 8: boundaries meet neither epochs
    nor steps.
    """
    plan = BatchPlan.with_doublings(2, doublings=2, every=11 / 2)
    sampler = RecordSampler(np.zeros(11, np.int32), 2, seed=5, doubled_at=plan.doubled_at)
    drawn = [sampler(step) for step in range(12)]
    assert [len(batch) for batch in drawn] == [2] * 6 + [4] * 3 + [8] * 3
    rounds = np.concatenate(drawn)[:44].reshape(4, 11)
    np.testing.assert_array_equal(np.sort(rounds, 1), np.tile(np.arange(11), (4, 1)))
    # The same records in the same order as without growth, and from any step on: resume is a step
    # number.
    plain = RecordSampler(np.zeros(11, np.int32), 2, seed=5)
    np.testing.assert_array_equal(
        np.concatenate(drawn), np.concatenate([plain(step) for step in range(24)])
    )
    for step in (7, 2, 10):
        np.testing.assert_array_equal(
            RecordSampler(sampler.labels, 2, 5, "uniform", plan.doubled_at)(step), drawn[step]
        )


@pytest.mark.parametrize("sampling", ["class_balanced", "square_root"])
def test_balanced_samplings_draw_the_batch_of_the_step(sampling):
    """Before the first doubling the same records as without one, then twice as many."""
    sampler, plain = (
        RecordSampler(LABELS, 6, 0, sampling, (2,)),
        RecordSampler(LABELS, 6, 0, sampling),
    )
    for step in range(2):
        np.testing.assert_array_equal(sampler(step), plain(step))
    assert [len(sampler(step)) for step in (2, 3)] == [12, 12]
    assert not (sampler(2) == sampler(3)).all()


@pytest.mark.parametrize("sampling", SAMPLING_SCHEMES)
def test_a_step_is_a_pure_function_of_seed_and_step(sampling):
    labels = np.random.default_rng(0).integers(0, 9, 50).astype(np.int32)
    sampler = RecordSampler(labels, 16, 3, sampling)
    forward = [sampler(step) for step in range(6)]
    again = RecordSampler(labels.copy(), 16, 3, sampling)
    for step in (5, 0, 3, 3, 1):
        np.testing.assert_array_equal(again(step), forward[step])
    assert all(batch.shape == (16,) and batch.dtype == np.int64 for batch in forward)
    assert not (forward[0] == forward[1]).all()
    assert not (RecordSampler(labels, 16, 4, sampling)(0) == forward[0]).all()


# Classes 0, 2, 5, 6 with 1, 4, 25 and 100 records, in mixed order; classes 1, 3, 4 have none.
COUNTS = {0: 1, 2: 4, 5: 25, 6: 100}
LABELS = (
    np.random.default_rng(1)
    .permutation(np.repeat(list(COUNTS), list(COUNTS.values())))
    .astype(np.int32)
)


@pytest.mark.parametrize(
    ("sampling", "power"), [("uniform", 1.0), ("class_balanced", 0.0), ("square_root", 0.5)]
)
def test_class_frequencies(sampling, power):
    """Chi-square over four classes: beyond 21.1 with p = 1e-4. The other samplings' shares lie far
    outside.
    """
    sampler = RecordSampler(LABELS, 65, 0, sampling)
    drawn = np.concatenate([sampler(step) for step in range(80)])
    counts = np.bincount(LABELS[drawn], minlength=7)
    assert counts[[1, 3, 4]].sum() == 0
    share = np.array(list(COUNTS.values()), float) ** power
    wanted = len(drawn) * share / share.sum()
    assert ((counts[list(COUNTS)] - wanted) ** 2 / wanted).sum() < 21.1


@pytest.mark.parametrize("sampling", ["class_balanced", "square_root"])
def test_records_of_a_class_are_alike(sampling):
    sampler = RecordSampler(LABELS, 100, 0, sampling)
    drawn = np.concatenate([sampler(step) for step in range(100)])
    members = np.flatnonzero(LABELS == 5)
    counts = np.bincount(drawn, minlength=len(LABELS))[members]
    wanted = counts.mean()
    assert ((counts - wanted) ** 2 / wanted).sum() < 58.6  # 24 degrees of freedom, p = 1e-4


def test_bad_settings_are_named():
    with pytest.raises(
        ValueError, match=r"data.sampling='balanced', wanted one of \('uniform', 'class_balanced'"
    ):
        RecordSampler(LABELS, 4, 0, "balanced")
    with pytest.raises(ValueError, match=r"no training records to sample from"):
        RecordSampler(np.zeros(0, np.int32), 4, 0)
