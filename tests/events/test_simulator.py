"""The known model of visitors does what it says, by counts of its own events."""

import collections

import numpy as np
import pytest

from sicot_jax.errors import InputError
from sicot_jax.events import simulator as visitors
from sicot_jax.events import store
from sicot_jax.events.simulator import Behaviour, Dirt, Lists


def one_list(**chances):
    """One query and three products: all of them clicked once looked at, half of what is clicked
    bought.
    """
    shape = np.ones((1, 3))
    return Lists(
        ["q"],
        ["a", "b", "c"],
        np.array([[2, 0, 1]]),
        shape * chances.get("click", 1),
        shape * chances.get("buy", 0.5),
    )


def tally(events):
    return collections.Counter((event.kind, event.sku) for event in events)


def test_places_are_looked_at_as_the_model_says():
    """r^-1: the third place gets a third of the clicks of the first; half of the clicks are
    purchases.
    """
    listed = list(visitors.events(one_list(), Behaviour(shuffled=0), requests=20_000))
    assert all(
        store.parse({**vars(event), "sku": event.sku or None}) == event
        for event in listed[:50]
        if event.sku
    )
    shown = [event for event in listed if event.kind == "impression"]
    assert len(shown) == 20_000
    assert {event.shown for event in shown} == {("c", "a", "b")}
    counts = tally(listed)
    for place, sku in enumerate("cab", 1):
        assert counts["click", sku] / 20_000 == pytest.approx(1 / place, abs=0.012)
        assert counts["purchase", sku] / counts["click", sku] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(visitors.looking(Behaviour(eta=1.0), 3), [1, 1 / 2, 1 / 3])


def test_in_shuffled_lists_every_product_is_everywhere():
    listed = list(visitors.events(one_list(), Behaviour(shuffled=1, eta=0), requests=6_000))
    first = collections.Counter(event.shown[0] for event in listed if event.kind == "impression")
    assert set(first) == {"a", "b", "c"}
    assert min(first.values()) > 1_850
    assert {tally(listed)["click", sku] for sku in "abc"} == {6_000}


def test_who_bought_may_look_no_further():
    model = Behaviour(shuffled=0, eta=0, ends_with_purchase=True)
    counts = tally(visitors.events(one_list(buy=1), model, requests=100))
    assert counts == {("impression", ""): 100, ("click", "c"): 100, ("purchase", "c"): 100}


def test_the_same_seed_gives_the_same_events():
    lists = visitors.generated_lists(queries=5, products=40, places=6)
    first, again, other = (
        list(visitors.events(lists, requests=200, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert all(len(set(row)) == 6 for row in lists.shown.tolist())


def test_likeness_and_quality_make_the_chances():
    """sigmoid(-1 + 2 * 0.5 + 1 * 3) = 0.9526 for the better of two products, sigmoid(0) for the
    other.
    """
    lists = visitors.from_scores(
        ["q"],
        ["a", "b"],
        np.array([[1, 0]]),
        np.array([[0.5, 0.5]]),
        np.array([0.0, 3.0]),
        click=(-1, 2, 1),
        buy=(0, 0, 1),
    )
    np.testing.assert_allclose(lists.click, [[1 / (1 + np.exp(-3)), 0.5]])
    np.testing.assert_allclose(lists.buy, [[1 / (1 + np.exp(-3)), 0.5]])


def test_dirt_of_each_kind(tmp_path):
    """Counted from the events themselves; the shares are those asked for."""
    lists = visitors.generated_lists(queries=20, products=400, places=6)
    dirt = Dirt(
        bots=0.1,
        bot_requests=100,
        repeated=0.02,
        twice=0.05,
        unshown=0.05,
        backwards=0.05,
        missing=0.02,
    )
    listed = list(visitors.events(lists, Behaviour(), dirt, requests=8_000))
    bots = {event.visitor for event in listed if event.visitor.startswith(visitors.BOT)}
    asked = sum(event.visitor in bots for event in listed if event.kind == "impression")
    assert len(bots) in (8, 9)
    assert abs(asked / 100 - len(bots)) < 0.5
    ids = collections.Counter(event.event_id for event in listed)
    assert sum(n - 1 for n in ids.values()) / len(ids) == pytest.approx(0.02, abs=0.004)
    assert sum(not event.visitor or not event.request_id for event in listed) / len(
        listed
    ) == pytest.approx(0.02, abs=0.004)
    lists_of = {
        event.request_id: event
        for event in listed
        if event.kind == "impression" and event.request_id
    }
    human = [
        e
        for e in listed
        if e.kind == "click" and e.request_id in lists_of and e.visitor not in bots
    ]
    assert sum(e.sku not in lists_of[e.request_id].shown for e in human) / len(
        human
    ) == pytest.approx(0.05, abs=0.01)
    assert sum(e.time < lists_of[e.request_id].time for e in human) / len(human) == pytest.approx(
        0.05, abs=0.01
    )
    pairs = collections.Counter((e.request_id, e.sku) for e in human)
    assert sum(n - 1 for n in pairs.values()) / len(human) == pytest.approx(
        0.07, abs=0.015
    )  # twice, and repeated
    assert visitors.write(
        lists, tmp_path / "log.parquet", Behaviour(), dirt, requests=8_000
    ) == len(listed)


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="shapes"):
        Lists(["q", "r"], ["a"], np.zeros((1, 1), int), np.ones((1, 1)), np.ones((1, 1)))
    with pytest.raises(InputError, match="product 3"):
        Lists(["q"], ["a"], np.full((1, 1), 3), np.ones((1, 1)), np.ones((1, 1)))
