"""The ranker, on small data sets with a known answer."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.damage import damaged_bytes, damaged_json, result_or_one_line
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.errors import InputError
from sicot_jax.search import ranker as rerank
from sicot_jax.search.ranker import Ranker, RankingLists, fit_ranking_model
from sicot_jax.search.ranking_features import FEATURES, CatalogStatistics

pytest.importorskip("lightgbm", reason="the ranker needs the service's extra")

STATISTICS = CatalogStatistics({}, frozenset())


@dataclasses.dataclass
class Product:
    title: str = ""
    category: str = ""
    quality: dict[str, float] = dataclasses.field(default_factory=dict)


def ranking_lists(gain, *, count=400, size=10, missing=0.0, seed=0):
    """Lists of random features; `gain` computes the gain of each entry from its named features."""
    rng = np.random.default_rng(seed)
    features = rng.random((count * size, len(FEATURES)))
    gains = gain(dict(zip(FEATURES, features.T, strict=True)))
    features[rng.random(features.shape) < missing] = np.nan
    list_id, position = np.repeat(np.arange(count), size), np.tile(np.arange(size), count)
    return RankingLists(features, list_id, position, gains)


def fit(shown):
    """A model fitted as if every position were examined."""
    return fit_ranking_model(shown, np.ones(10))


def ranker(model):
    return Ranker("a recognizer", STATISTICS, model, {})


def test_a_quality_that_decides_is_learned():
    model = fit(ranking_lists(lambda by_name: (by_name["rating"] > 0.5) + 0.1))
    products = [Product(quality={"rating": rating}) for rating in (0.1, 0.9, 0.2, 0.8)]
    order = np.argsort(
        -ranker(model).scores(np.array([0.9, 0.5, 0.6, 0.4]), products), kind="stable"
    )
    assert set(order[:2]) == {1, 3}
    assert len(ranker(model).scores(np.zeros(0), [])) == 0


def test_the_score_is_the_log_of_the_expected_gain():
    """A monotone feature is learned by the regression, a step by the trees."""
    model = fit(
        ranking_lists(
            lambda by_name: (
                np.exp(2 * by_name["sales"]) * np.where(by_name["price"] > 0.5, 2.0, 0.5)
            ),
            count=2000,
        )
    )
    middle = np.full((4, len(FEATURES)), 0.5)
    middle[:2, FEATURES.index("sales")] = 0.2, 0.8
    middle[2:, FEATURES.index("price")] = 0.3, 0.7
    scores = model(middle)
    assert scores[1] - scores[0] == pytest.approx(2 * 0.6, rel=0.1)
    assert scores[3] - scores[2] == pytest.approx(np.log(4), rel=0.1)
    assert model.regression.coef[FEATURES.index("rating")] == pytest.approx(0, abs=0.02)


def test_clicks_are_weighted_by_inverse_propensity():
    """Products of price 0 stand first, products of price 1 second, which one in ten examines; the
    latter are wanted twice as much.
    """
    rng = np.random.default_rng(0)
    second = np.tile(np.arange(2), 20_000)
    features = np.full((40_000, len(FEATURES)), 0.5)
    features[:, FEATURES.index("price")] = second
    propensity = np.array([1.0, 0.1])
    clicks = (rng.random(40_000) < propensity[second] * 0.2 * (1 + second)).astype(float)
    shown = RankingLists(features, np.arange(40_000) // 2, second, clicks)
    scores = fit_ranking_model(shown, propensity)(features[:2])
    assert np.exp(scores[1] - scores[0]) == pytest.approx(2, rel=0.2)
    scores = fit_ranking_model(shown, np.ones(2))(features[:2])
    assert np.exp(scores[1] - scores[0]) == pytest.approx(0.2, rel=0.2)


def test_features_may_be_missing():
    """In the training data and in what is ranked."""
    model = fit(ranking_lists(lambda by_name: (by_name["rating"] > 0.5) + 0.1, missing=0.3))
    good, unknown, bad = (
        Product(quality={"rating": 0.9}),
        Product(),
        Product(quality={"rating": 0.1}),
    )
    scores = ranker(model).scores(np.full(3, 0.5), [good, unknown, bad])
    assert np.isfinite(scores).all()
    assert scores[0] > scores[1] > scores[2]


def test_sales_of_0_and_1_and_unknown():
    """Learned where sales are unknown, and wanted most, or 1 at least: 0 is scored like the
    smallest known value, not like unknown; and a free product like the cheapest.
    """
    rng = np.random.default_rng(0)
    shown = ranking_lists(lambda by_name: np.zeros(4000))
    sales = np.where(rng.random(4000) < 0.5, np.nan, rng.integers(1, 100, 4000))
    price = np.where(rng.random(4000) < 0.5, np.nan, rng.uniform(0.5, 2.0, 4000))
    shown.features[:, FEATURES.index("sales")] = np.log1p(sales)
    shown.features[:, FEATURES.index("price")] = np.log(price)
    gain = np.where(np.isnan(sales), 1.0, (1 + sales) / 50) * np.where(np.isnan(price), 2.0, 0.5)
    model = fit(dataclasses.replace(shown, gain=gain))

    def score(**quality):
        statistics = CatalogStatistics({"": 1.0}, frozenset())
        described = [Product(quality={"sales": 50.0, "price": 1.0} | quality)]
        return Ranker("r", statistics, model, {}).scores(np.full(1, 0.5), described)[0]

    assert score(sales=0.0) == score(sales=1.0) < score(sales=2.0) < score(sales=50.0)
    unknown = score(sales=np.nan)
    assert np.exp(unknown - score(sales=0.0)) == pytest.approx(25, rel=0.3)
    assert score(price=0.0) == score(price=0.5)
    assert np.exp(score(price=np.nan) - score(price=0.0)) == pytest.approx(4.0, rel=0.2)


def test_scores_are_monotone_in_similarity_sales_conversion_and_rating():
    """Even where noisy gains suggest otherwise."""
    noise = np.random.default_rng(1)
    model = fit(
        ranking_lists(
            lambda by_name: noise.exponential(2 - by_name["similarity"] - by_name["rating"]),
            count=100,
            missing=0.2,
        )
    )
    rows = np.repeat(noise.random((20, 1, len(FEATURES))), 50, 1)
    for name, sign in (
        ("similarity", 1),
        ("similarity gap", -1),
        ("sales", 1),
        ("conversion", 1),
        ("rating", 1),
    ):
        varied = rows.copy()
        varied[:, :, FEATURES.index(name)] = np.linspace(-1, 2, 50)
        scores = model(varied.reshape(-1, len(FEATURES))).reshape(20, 50)
        assert (sign * np.diff(scores, axis=1) >= 0).all(), name


def test_a_ranker_that_is_written_and_read_gives_the_same_scores(tmp_path):
    assert rerank.read_ranker(tmp_path / "ranker.json") is None
    written = Ranker(
        "a recognizer",
        CatalogStatistics({"ä": 2.0}, frozenset({"red"})),
        fit(ranking_lists(lambda t: t["sales"])),
        {"a": 1},
    )
    version = rerank.write_ranker(tmp_path / "ranker.json", written)
    read = rerank.read_ranker(tmp_path / "ranker.json")
    assert (read.recognizer, read.catalog_statistics, read.report, read.version) == (
        "a recognizer",
        written.catalog_statistics,
        {"a": 1},
        version,
    )
    products = [Product("red hat", "ä", {"sales": n, "price": 1.0 + n}) for n in range(9)]
    similarity = np.linspace(0.9, 0.1, 9)
    np.testing.assert_array_equal(
        read.scores(similarity, products), written.scores(similarity, products)
    )
    assert rerank.write_ranker(tmp_path / "again.json", written) == version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored | {"format": 0}, "another format"),
        (lambda stored: stored | {"features": ["similarity"]}, "another format"),
        (lambda stored: stored | {"recognizer": "another"}, "sha256 does not match"),
        (lambda stored: stored | {"trees": stored["trees"][:1000]}, "sha256 does not match"),
        (
            lambda stored: {"format": stored["format"], "features": stored["features"]},
            "sha256 does not match",
        ),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line(tmp_path, change, message):
    path = tmp_path / "ranker.json"
    rerank.write_ranker(path, ranker(fit(ranking_lists(lambda by_name: by_name["sales"]))))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=message) as error:
        rerank.read_ranker(path)
    assert "sicot index rank" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def stored_ranker(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranker") / "ranker.json"
    rerank.write_ranker(
        path, ranker(fit(ranking_lists(lambda by_name: by_name["sales"], count=50)))
    )
    return path.read_bytes()


@given(data=st.data())
def test_any_damage_is_an_error_of_one_line_or_changes_nothing(tmp_path, stored_ranker, data):
    path = tmp_path / "ranker.json"
    kind = data.draw(st.sampled_from((damaged_bytes, damaged_json)))
    if kind is damaged_bytes:
        path.write_bytes(data.draw(damaged_bytes(stored_ranker)))
    else:
        path.write_text(data.draw(damaged_json(json.loads(stored_ranker))))
    read = result_or_one_line(lambda: rerank.read_ranker(path))
    if read is not None:  # white space alone, or the same value again
        assert read.version == json.loads(stored_ranker)["sha256"]
