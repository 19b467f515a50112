"""The ranker on small sets where what is right is known."""

import dataclasses
import json
import math

import numpy as np
import pytest

from sicot_jax.errors import InputError
from sicot_jax.search import ranker as rerank
from sicot_jax.search.ranker import Lists, Ranker, ndcg, ndcgs
from sicot_jax.search.ranking_features import FEATURES, Usual

pytest.importorskip("lightgbm", reason="the ranker needs the service's extra")

USUAL = Usual({}, frozenset())


@dataclasses.dataclass
class Product:
    title: str = ""
    category: str = ""
    quality: dict[str, float] = dataclasses.field(default_factory=dict)


def lists(gain, *, count=400, size=10, missing=0.0, seed=0):
    """Of random numbers; what is gained of each line is `gain` of its columns by name."""
    rng = np.random.default_rng(seed)
    rows = rng.random((count * size, len(FEATURES)))
    wanted = gain(dict(zip(FEATURES, rows.T, strict=True)))
    rows[rng.random(rows.shape) < missing] = np.nan
    return Lists(rows, np.repeat(np.arange(count), size), np.tile(np.arange(size), count), wanted)


def fit(shown):
    """Every position is looked at."""
    return rerank.fit(shown, np.ones(10))


def ranker(model):
    return Ranker("a recogniser", USUAL, model, {})


def test_ndcg_by_hand():
    """Gains 1, 0, 3 shown so: 1 + 0 + 3 / 2 of at most 3 + 1 / log2(3)."""
    assert ndcg([1, 0, 3]) == pytest.approx(2.5 / (3 + 1 / math.log2(3)))
    assert ndcg([3, 1, 0]) == 1
    assert ndcg([1, 0, 3], k=1) == pytest.approx(1 / 3)
    assert math.isnan(ndcg([0, 0]))


def test_each_list_is_put_in_order_and_one_without_gains_says_nothing():
    gains = np.array([1.0, 0, 3, 0, 0, 5, 4])
    found = ndcgs(np.array([3.0, 2, 1, 1, 1, 0, 0]), np.array([0, 0, 0, 1, 1, 2, 2]), gains)
    np.testing.assert_allclose(found, [2.5 / (3 + 1 / math.log2(3)), 1])


def test_where_quality_decides_the_ranker_says_so():
    model = fit(lists(lambda told: (told["rating"] > 0.5) + 0.1))
    products = [Product(quality={"rating": rating}) for rating in (0.1, 0.9, 0.2, 0.8)]
    order = np.argsort(
        -ranker(model).scores(np.array([0.9, 0.5, 0.6, 0.4]), products), kind="stable"
    )
    assert set(order[:2]) == {1, 3}
    assert len(ranker(model).scores(np.zeros(0), [])) == 0


def test_the_score_is_the_logarithm_of_what_is_gained_where_every_position_is_looked_at():
    """A rising feature in the regression, a step in the trees."""
    model = fit(
        lists(
            lambda told: np.exp(2 * told["sales"]) * np.where(told["price"] > 0.5, 2.0, 0.5),
            count=2000,
        )
    )
    middle = np.full((4, len(FEATURES)), 0.5)
    middle[:2, FEATURES.index("sales")] = 0.2, 0.8
    middle[2:, FEATURES.index("price")] = 0.3, 0.7
    scores = model(middle)
    assert scores[1] - scores[0] == pytest.approx(2 * 0.6, rel=0.1)
    assert scores[3] - scores[2] == pytest.approx(np.log(4), rel=0.1)
    assert model.line.weights[FEATURES.index("rating")] == pytest.approx(0, abs=0.02)


def test_a_click_counts_for_all_that_would_have_been_had_all_looked():
    """Alike products are shown first and unlike ones last, where one in ten looks; wanted are the
    unlike ones twice as much.
    """
    rng = np.random.default_rng(0)
    unlike = np.tile(np.arange(2), 20_000)
    rows = np.full((40_000, len(FEATURES)), 0.5)
    rows[:, FEATURES.index("price")] = unlike
    looked_at = np.array([1.0, 0.1])
    clicks = (rng.random(40_000) < looked_at[unlike] * 0.2 * (1 + unlike)).astype(float)
    shown = Lists(rows, np.arange(40_000) // 2, unlike, clicks)
    scores = rerank.fit(shown, looked_at)(rows[:2])
    assert np.exp(scores[1] - scores[0]) == pytest.approx(2, rel=0.2)
    scores = rerank.fit(shown, np.ones(2))(rows[:2])
    assert np.exp(scores[1] - scores[0]) == pytest.approx(0.2, rel=0.2)


def test_numbers_may_be_missing():
    """In what it learns from, and in what it ranks."""
    model = fit(lists(lambda told: (told["rating"] > 0.5) + 0.1, missing=0.3))
    good, unknown, bad = (
        Product(quality={"rating": 0.9}),
        Product(),
        Product(quality={"rating": 0.1}),
    )
    scores = ranker(model).scores(np.full(3, 0.5), [good, unknown, bad])
    assert np.isfinite(scores).all()
    assert scores[0] > scores[1] > scores[2]


def test_more_likeness_sales_conversion_or_rating_never_hurts():
    """Whatever a few events say."""
    noise = np.random.default_rng(1)
    model = fit(
        lists(lambda told: noise.exponential(2 - told["likeness"] - told["rating"]), count=100)
    )
    rows = np.repeat(noise.random((20, 1, len(FEATURES))), 50, 1)
    for name, sign in (
        ("likeness", 1),
        ("behind", -1),
        ("sales", 1),
        ("conversion", 1),
        ("rating", 1),
    ):
        varied = rows.copy()
        varied[:, :, FEATURES.index(name)] = np.linspace(0, 1, 50)
        scores = model(varied.reshape(-1, len(FEATURES))).reshape(20, 50)
        assert (sign * np.diff(scores, axis=1) >= 0).all(), name


def test_written_and_read_it_says_the_same(tmp_path):
    assert rerank.read_ranker(tmp_path / "ranker.json") is None
    made = Ranker(
        "a recogniser",
        Usual({"ä": 2.0}, frozenset({"red"})),
        fit(lists(lambda t: t["sales"])),
        {"a": 1},
    )
    version = rerank.write_ranker(tmp_path / "ranker.json", made)
    read = rerank.read_ranker(tmp_path / "ranker.json")
    assert (read.recogniser, read.usual, read.report, read.version) == (
        "a recogniser",
        made.usual,
        {"a": 1},
        version,
    )
    products = [Product("red hat", "ä", {"sales": n, "price": 1.0 + n}) for n in range(9)]
    likeness = np.linspace(0.9, 0.1, 9)
    np.testing.assert_array_equal(read.scores(likeness, products), made.scores(likeness, products))
    assert rerank.write_ranker(tmp_path / "again.json", made) == version


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda stored: stored | {"format": 0}, "another format"),
        (lambda stored: stored | {"features": ["likeness"]}, "another format"),
        (lambda stored: stored | {"recogniser": "another"}, "another sha256"),
        (lambda stored: stored | {"trees": stored["trees"][:1000]}, "another sha256"),
        (
            lambda stored: {"format": stored["format"], "features": stored["features"]},
            "another sha256",
        ),
    ],
)
def test_a_damaged_file_is_told_in_one_line(tmp_path, change, said):
    path = tmp_path / "ranker.json"
    rerank.write_ranker(path, ranker(fit(lists(lambda told: told["sales"]))))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=said) as error:
        rerank.read_ranker(path)
    assert "sicot index rank" in str(error.value)
    assert "\n" not in str(error.value)
