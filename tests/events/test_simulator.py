"""The click simulator does what its model says, by counts of the simulated events."""

import collections

import numpy as np
import pytest

from sicot_jax.errors import InputError
from sicot_jax.events import simulator, store
from sicot_jax.events.simulator import BOT_PREFIX, ClickModel, LogNoise, SimulatedResults


def one_list(**chances):
    """One query and three products: all of them clicked once examined, half of what is clicked
    bought.
    """
    shape = np.ones((1, 3))
    return SimulatedResults(
        ["q"],
        ["a", "b", "c"],
        np.array([[2, 0, 1]]),
        shape * chances.get("click", 1),
        shape * chances.get("buy", 0.5),
    )


def tally(events):
    return collections.Counter((event.kind, event.sku) for event in events)


def test_positions_are_examined_as_the_model_says():
    """r^-1: the third position gets a third of the clicks of the first; half of the clicks are
    purchases.
    """
    listed = list(
        simulator.simulate_events(one_list(), ClickModel(shuffled_share=0), num_requests=20_000)
    )
    assert all(
        store.parse_event({**vars(event), "sku": event.sku or None}) == event
        for event in listed[:50]
        if event.sku
    )
    shown = [event for event in listed if event.kind == "impression"]
    assert len(shown) == 20_000
    assert {event.shown for event in shown} == {("c", "a", "b")}
    counts = tally(listed)
    for position, sku in enumerate("cab", 1):
        assert counts["click", sku] / 20_000 == pytest.approx(1 / position, abs=0.012)
        assert counts["purchase", sku] / counts["click", sku] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(ClickModel(eta=1.0).propensity(3), [1, 1 / 2, 1 / 3])


def test_in_shuffled_lists_every_product_is_everywhere():
    listed = list(
        simulator.simulate_events(
            one_list(), ClickModel(shuffled_share=1, eta=0), num_requests=6_000
        )
    )
    first = collections.Counter(event.shown[0] for event in listed if event.kind == "impression")
    assert set(first) == {"a", "b", "c"}
    assert min(first.values()) > 1_850
    assert {tally(listed)["click", sku] for sku in "abc"} == {6_000}


def test_nothing_is_examined_after_a_purchase():
    model = ClickModel(shuffled_share=0, eta=0, stop_after_purchase=True)
    counts = tally(simulator.simulate_events(one_list(buy=1), model, num_requests=100))
    assert counts == {("impression", ""): 100, ("click", "c"): 100, ("purchase", "c"): 100}


def test_the_same_seed_gives_the_same_events():
    results = simulator.random_results(num_queries=5, num_products=40, num_positions=6)
    first, again, other = (
        list(simulator.simulate_events(results, num_requests=200, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert all(len(set(row)) == 6 for row in results.shown.tolist())


def test_similarity_and_quality_make_the_probabilities():
    """sigmoid(-1 + 2 * 0.5 + 1 * 3) = 0.9526 for the better of two products, sigmoid(0) for the
    other.
    """
    results = simulator.results_from_scores(
        ["q"],
        ["a", "b"],
        np.array([[1, 0]]),
        np.array([[0.5, 0.5]]),
        np.array([0.0, 3.0]),
        click_weights=(-1, 2, 1),
        purchase_weights=(0, 0, 1),
    )
    np.testing.assert_allclose(results.click_probability, [[1 / (1 + np.exp(-3)), 0.5]])
    np.testing.assert_allclose(results.purchase_probability, [[1 / (1 + np.exp(-3)), 0.5]])


def test_noise_of_each_kind(tmp_path):
    """Counted from the events themselves; the shares are those of the settings."""
    results = simulator.random_results(num_queries=20, num_products=400, num_positions=6)
    noise = LogNoise(
        bots=0.1,
        requests_per_bot=100,
        duplicates=0.02,
        double_clicks=0.05,
        unshown_clicks=0.05,
        clock_errors=0.05,
        missing_fields=0.02,
    )
    listed = list(simulator.simulate_events(results, ClickModel(), noise, num_requests=8_000))
    bots = {event.visitor for event in listed if event.visitor.startswith(BOT_PREFIX)}
    bot_requests = sum(event.visitor in bots for event in listed if event.kind == "impression")
    assert len(bots) in (8, 9)
    assert abs(bot_requests / 100 - len(bots)) < 0.5
    ids = collections.Counter(event.event_id for event in listed)
    assert sum(n - 1 for n in ids.values()) / len(ids) == pytest.approx(0.02, abs=0.004)
    assert sum(not event.visitor or not event.request_id for event in listed) / len(
        listed
    ) == pytest.approx(0.02, abs=0.004)
    impression_of = {
        event.request_id: event
        for event in listed
        if event.kind == "impression" and event.request_id
    }
    human = [
        e
        for e in listed
        if e.kind == "click" and e.request_id in impression_of and e.visitor not in bots
    ]
    assert sum(e.sku not in impression_of[e.request_id].shown for e in human) / len(
        human
    ) == pytest.approx(0.05, abs=0.01)
    assert sum(e.time < impression_of[e.request_id].time for e in human) / len(
        human
    ) == pytest.approx(0.05, abs=0.01)
    pairs = collections.Counter((e.request_id, e.sku) for e in human)
    assert sum(n - 1 for n in pairs.values()) / len(human) == pytest.approx(
        0.07, abs=0.015
    )  # twice, and repeated
    assert simulator.write_simulated_log(
        results, tmp_path / "log.parquet", ClickModel(), noise, num_requests=8_000
    ) == len(listed)


def test_results_of_other_shapes_are_refused():
    with pytest.raises(InputError, match="shapes"):
        SimulatedResults(["q", "r"], ["a"], np.zeros((1, 1), int), np.ones((1, 1)), np.ones((1, 1)))
    with pytest.raises(InputError, match="product 3"):
        SimulatedResults(["q"], ["a"], np.full((1, 1), 3), np.ones((1, 1)), np.ones((1, 1)))
