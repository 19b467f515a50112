"""Batch sizes of steps: by hand, and what holds for every plan."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.config.batch_plan import BatchPlan

PLANS = st.builds(
    BatchPlan,
    st.integers(1, 64),
    st.lists(st.integers(0, 200), max_size=5).map(lambda steps: tuple(sorted(steps))),
)
STEPS = st.integers(0, 400)


@given(PLANS, STEPS)
def test_steps_for_is_the_inverse_of_batches_before(plan, step):
    assert plan.steps_for(plan.batches_before(step)) == step


@given(PLANS, STEPS)
def test_steps_for_gives_the_first_step_with_so_many_batches_before_it(plan, batches):
    step = plan.steps_for(batches)
    assert plan.batches_before(step) >= batches
    assert step == 0 or plan.batches_before(step - 1) < batches


@given(PLANS, STEPS)
def test_a_batch_begins_where_the_one_before_ends(plan, step):
    assert plan.first_position(step) == sum(plan.size(earlier) for earlier in range(step))


@given(PLANS)
def test_an_array_of_steps_counts_like_each_step(plan):
    steps = np.arange(250)
    expected = [plan.batches_before(int(step)) for step in steps]
    np.testing.assert_array_equal(plan.batches_before(steps), expected)


@given(PLANS, STEPS, st.integers(0, 50))
def test_sizes_are_those_of_the_steps(plan, start, steps):
    expected = sorted({plan.size(step) for step in range(start, start + steps)})
    assert plan.sizes(start, start + steps) == expected


@given(PLANS, st.integers(1, 300), st.integers(1, 20))
def test_crosses_multiple_is_whether_a_multiple_was_reached(plan, step, every):
    taken = range(plan.batches_before(step - 1) + 1, plan.batches_before(step) + 1)
    assert plan.crosses_multiple(step, every) == any(count % every == 0 for count in taken)


def test_batch_plan_by_hand():
    """Batches of 3, from step 4 on of 6, from step 6 on of 12: 0 3 6 9 12 18 24 36 ... records
    before a step.
    """
    plan = BatchPlan(3, (4, 6))
    assert [plan.size(step) for step in range(8)] == [3, 3, 3, 3, 6, 6, 12, 12]
    assert [plan.first_position(step) for step in range(9)] == [0, 3, 6, 9, 12, 18, 24, 36, 48]
    assert [plan.batches_before(step) for step in range(9)] == [0, 1, 2, 3, 4, 6, 8, 12, 16]
    np.testing.assert_array_equal(plan.batches_before(np.arange(9)), [0, 1, 2, 3, 4, 6, 8, 12, 16])
    assert [plan.steps_for(batches) for batches in (0, 3, 4, 5, 6, 7, 8, 9, 12, 13)] == [
        0,
        3,
        4,
        5,
        5,
        6,
        6,
        7,
        7,
        8,
    ]
    assert plan.sizes(0, 7) == [3, 6, 12]
    assert plan.sizes(4, 6) == [6]
    assert plan.sizes(5, 5) == []
    assert [step for step in range(1, 9) if plan.crosses_multiple(step, 5)] == [
        5,
        7,
        8,
    ]  # of 1 2 3 4 6 8 12 16 batches
    assert BatchPlan(3).batches_before(7) == 7
    assert BatchPlan(3).steps_for(7) == 7


@pytest.mark.parametrize("every", [5.0, 3.3, 1.0, 0.4])
def test_a_batch_grows_at_the_first_step_after_each_so_many_batches(every):
    """The last two: a period shorter than a step of the grown batch, and than the first step."""
    plan = BatchPlan.with_doublings(8, doublings=3, every=every)
    assert len(plan.doubled_at) == 3
    for i, step in enumerate(plan.doubled_at):
        due = round((i + 1) * every)
        assert plan.batches_before(step) >= due
        assert step == 0 or plan.batches_before(step - 1) < due
    assert plan.size(plan.doubled_at[-1]) == 64
    for batches in range(40):
        step = plan.steps_for(batches)
        assert plan.batches_before(step) >= batches
        assert step == 0 or plan.batches_before(step - 1) < batches
