"""What the order of similar products is worth by likeness alone and by the ranker, where it is
known what visitors want.

Command:  python -m benchmarks.reranking [--seeds 5] [--lists 2000]

A made shop: 2,000 products in 20 categories with sales, conversion, rating, price, sharpness of the
  picture and a title, all of them noisy traces of how good a product is, which no feature tells.
  Visitors (events/visitors) are shown the 20 products most alike, a tenth of them in a random
  order, look at position k with probability 1 / k, click on what they look at by its likeness,
  quality, price and picture, and buy what they clicked on by its quality, price and title. Rankers
  learn from the log of that and put the 40 most alike products of another 1,000 requests in order,
  of which 20 are shown. In a second shop visitors
think in steps: they pass over blurred pictures and odd prices, and quality counts where a product
  is alike enough.

NDCG@20 is of the probability that a product is bought when it is looked at, over the 40; purchases
are expected ones, of the same visitors, in 100 requests. Differences are from likeness alone, in
pairs; 95 % intervals over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np
from scipy import stats

from benchmarks import timing
from sicot_jax.events import simulator as visitors
from sicot_jax.indexing import fit_ranker as rank
from sicot_jax.search import ranker as rerank
from sicot_jax.search.ndcg import NDCG_CUTOFF, ndcg
from sicot_jax.search.ranker import RankingLists
from sicot_jax.search.ranking_features import FEATURES, CatalogStatistics, ranking_features

PRODUCTS, CATEGORIES, CANDIDATES, TESTED = 2_000, 20, 40, 1_000
BEHAVIOUR = visitors.Behaviour()
LOOKED_AT = visitors.looking(BEHAVIOUR, NDCG_CUTOFF)
LIKENESS = "likeness"
WORDS = [f"word{n}" for n in range(300)]


@dataclasses.dataclass(frozen=True)
class Product:
    title: str
    category: str
    quality: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Requests:
    """likeness, rows, clicks and purchases (probabilities, of what is looked at) of candidates,
    nearest first: [R, N, ...].
    """

    rows: np.ndarray
    click: np.ndarray
    buy: np.ndarray

    @property
    def wanted(self) -> np.ndarray:
        return self.click * self.buy


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Shop:
    def __init__(self, seed: int, *, steps: bool):
        self.steps = steps
        self.rng = rng = np.random.default_rng(seed)
        self.good = rng.normal(size=PRODUCTS)
        self.dear, self.sharp = rng.normal(0, 0.5, PRODUCTS), rng.normal(0, 1, PRODUCTS)
        self.told = rng.integers(1, 9, PRODUCTS)  # words of a title that say something
        category = rng.integers(CATEGORIES, size=PRODUCTS)
        usual = rng.lognormal(3, 1, CATEGORIES)[category]
        views = rng.lognormal(5, 1, PRODUCTS)
        sold = rng.poisson(views * sigmoid(-3.5 + 0.7 * self.good - 0.5 * self.dear))
        rating = np.clip(4 + 0.5 * self.good + rng.normal(0, 0.4, PRODUCTS), 1, 5)
        self.products = [
            Product(
                " ".join(rng.choice(WORDS, self.told[n], replace=False)) + f" {n:x}qz",
                str(category[n]),
                {
                    "sales": float(sold[n]),
                    "conversion": float(sold[n] / views[n]),
                    "rating": float(rating[n]),
                    "price": float(usual[n] * np.exp(self.dear[n])),
                    "sharpness": float(np.exp(6 + self.sharp[n])),
                },
            )
            for n in range(PRODUCTS)
        ]
        self.usual = CatalogStatistics.from_products(self.products)

    def requests(self, count: int) -> Requests:
        rng = self.rng
        found = np.array([rng.choice(PRODUCTS, CANDIDATES, replace=False) for _ in range(count)])
        likeness = np.sort(
            np.clip(rng.normal(0.85, 0.05, (count, 1)) - rng.exponential(0.08, found.shape), -1, 1),
            1,
        )[:, ::-1]
        rows = np.array(
            [
                ranking_features(cosine, [self.products[n] for n in own], self.usual)
                for cosine, own in zip(likeness, found, strict=True)
            ]
        )
        good, dear, sharp, told = (x[found] for x in (self.good, self.dear, self.sharp, self.told))
        if self.steps:
            click = sigmoid(
                -1.5
                + 10 * (likeness - 0.8)
                + 0.5 * good
                - 1.5 * (np.abs(dear) > 0.5)
                - 1.5 * (sharp < -0.5)
            )
            buy = sigmoid(
                -2.5 + 1.5 * (likeness > 0.75) * good - 1.5 * (dear > 0.4) + 1.0 * (told > 2)
            )
        else:
            click = sigmoid(
                -2.5
                + 10 * (likeness - 0.8)
                + 0.5 * good
                - 0.8 * np.abs(dear)
                + 0.4 * np.tanh(sharp)
            )
            buy = sigmoid(
                -2.5 + 4 * (likeness - 0.8) + 0.8 * good - 0.8 * dear + 0.15 * np.minimum(told, 6)
            )
        return Requests(rows, click, buy)

    def log(self, requests: Requests) -> RankingLists:
        """What visitors did with the most alike ones, as the log has it."""
        count = len(requests.rows)
        ids, skus = [f"q{n}" for n in range(count)], [f"p{n}" for n in range(NDCG_CUTOFF)]
        shown, top = np.tile(np.arange(NDCG_CUTOFF), (count, 1)), slice(NDCG_CUTOFF)
        lists = visitors.Lists(ids, skus, shown, requests.click[:, top], requests.buy[:, top])
        seed = int(self.rng.integers(1 << 30))
        views = rank.views(visitors.events(lists, BEHAVIOUR, requests=count, seed=seed))
        at = [
            ([int(view.query_image_id[1:])] * NDCG_CUTOFF, [int(sku[1:]) for sku in view.shown])
            for view in views
        ]
        asked, places = np.array(at).transpose(1, 0, 2)
        return RankingLists(
            requests.rows[asked, places].reshape(-1, len(FEATURES)),
            np.repeat(np.arange(count), NDCG_CUTOFF),
            np.tile(np.arange(NDCG_CUTOFF), count),
            np.array([view.wanted.get(sku, 0.0) for view in views for sku in view.shown]),
        )


def without(rows: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of quality lost at random, as many lines of a product lose others."""
    lost = rng.random(rows.shape) < share
    lost[..., :2] = False
    return np.where(lost, np.nan, rows)


def logistic(rows: np.ndarray, lists: RankingLists, looked_at: np.ndarray, *, strength: float):
    """Clicked or not, by inverse propensities as the trees have them: a click weighs y, what was
    passed over p.
    """
    from sklearn.linear_model import LogisticRegression

    weight = np.where(lists.gain > 0, lists.gain, looked_at[lists.position])
    return LogisticRegression(C=strength, max_iter=2000).fit(
        rows, lists.gain > 0, sample_weight=weight
    )


def raw_logistic(lists: RankingLists, looked_at: np.ndarray):
    """Features made comparable; a missing one is the mean and says that it is missing."""
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    prepared = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler()).fit(lists.features)
    model = logistic(prepared.transform(lists.features), lists, looked_at, strength=1.0)
    return lambda rows: model.decision_function(prepared.transform(rows))


def trees_alone(lists: RankingLists, looked_at: np.ndarray, count: int = 200):
    """As many as they gain by without a regression before them."""
    import lightgbm

    weight = looked_at[lists.position]
    return lightgbm.train(
        rerank.TREE_PARAMS, lightgbm.Dataset(lists.features, lists.gain / weight, weight=weight), count
    )


def tree_logistic(trees, lists: RankingLists, looked_at: np.ndarray):
    """He et al. 2014: which leaf of each tree a line falls into, one of each, is what the logistic
    regression reads.
    """
    from sklearn.preprocessing import OneHotEncoder

    def leaves(rows: np.ndarray) -> np.ndarray:
        return trees.predict(rows, pred_leaf=True, num_threads=1)

    encoder = OneHotEncoder(handle_unknown="ignore").fit(leaves(lists.features))
    # Of 0.0001, 0.0003, 0.001 and 0.003 the best on two seeds.
    model = logistic(encoder.transform(leaves(lists.features)), lists, looked_at, strength=0.0003)
    return lambda rows: model.decision_function(encoder.transform(leaves(rows)))


def measured(requests: Requests, score, *, candidates: int = CANDIDATES) -> tuple[float, float]:
    """NDCG@20 and purchases in 100 requests, of the best 20 of so many candidates."""
    rows = requests.rows[:, :candidates]
    scores = score(rows.reshape(-1, len(FEATURES))).reshape(rows.shape[:2])
    order = np.argsort(-scores, axis=1, kind="stable")
    rest = np.tile(np.arange(candidates, CANDIDATES), (len(order), 1))
    shown = np.take_along_axis(requests.wanted, np.concatenate([order, rest], 1), 1)
    return float(np.mean([ndcg(line) for line in shown])), float(
        100 * (shown[:, :NDCG_CUTOFF] @ LOOKED_AT).mean()
    )


def of_seed(seed: int, count: int, *, steps: bool) -> dict[str, tuple[float, float]]:
    shop = Shop(seed, steps=steps)
    learned, tested = shop.log(shop.requests(count)), shop.requests(TESTED)
    looked_at, rng = rerank.fit_examination_propensity(learned), np.random.default_rng(seed)
    model, trees = rerank.fit_ranking_model(learned, looked_at), trees_alone(learned, looked_at)
    lossy = dataclasses.replace(learned, features=without(learned.features, 0.3, rng))
    tested_lossy = dataclasses.replace(tested, rows=without(tested.rows, 0.3, rng))
    few = learned.select(learned.list_id < count // 10)
    return {
        LIKENESS: measured(tested, lambda rows: rows[:, 0]),
        "regression, then trees (the ranker)": measured(tested, model),
        "the regression of it alone": measured(tested, model.regression),
        "trees alone": measured(
            tested, lambda rows: trees.predict(rows, raw_score=True, num_threads=1)
        ),
        "trees, then logistic regression": measured(
            tested, tree_logistic(trees, learned, looked_at)
        ),
        "logistic regression of the features": measured(tested, raw_logistic(learned, looked_at)),
        "ranker, the 20 most alike alone": measured(tested, model, candidates=NDCG_CUTOFF),
        "ranker, positions known": measured(tested, rerank.fit_ranking_model(learned, LOOKED_AT)),
        "ranker, positions not corrected": measured(tested, rerank.fit_ranking_model(learned, np.ones(NDCG_CUTOFF))),
        f"ranker, {count // 10:,} lists": measured(tested, rerank.fit_ranking_model(few, rerank.fit_examination_propensity(few))),
        "ranker, 30 % of the numbers missing": measured(
            tested_lossy, rerank.fit_ranking_model(lossy, rerank.fit_examination_propensity(lossy))
        ),
        "what visitors want": measured(tested, lambda rows: tested.wanted.ravel()),
    }


def interval(values: np.ndarray) -> str:
    middle, spread = (
        values.mean(),
        stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)),
    )
    return f"{middle:+.3f} [{middle - spread:+.3f}, {middle + spread:+.3f}]"


def model_of(shop: Shop) -> rerank.RankingModel:
    """Fitted to 500 lists of the shop."""
    return rerank.fit_ranking_model(shop.log(shop.requests(500)), LOOKED_AT)


def latency() -> list[list[str]]:
    """Of a list, features and scores; one thread."""
    shop = Shop(0, steps=False)
    model = model_of(shop)
    ranker, rows = rerank.Ranker("", shop.usual, model, {}), []
    for count in (20, 40, 200, 400):
        likeness, own, times = np.linspace(0.9, 0.5, count), shop.products[:count], []
        lines = ranking_features(likeness, own, shop.usual)
        for _ in range(500):
            start = time.perf_counter()
            ranker.scores(likeness, own)
            middle = time.perf_counter()
            model(lines)
            times.append((middle - start, time.perf_counter() - middle))
        whole, alone = np.array(times).T * 1e3
        rows.append(
            [str(count), *(f"{np.quantile(x, q):.2f}" for x in (whole, alone) for q in (0.5, 0.99))]
        )
    return rows


def table(found: list[dict[str, tuple[float, float]]]) -> list[list[str]]:
    rows, of_row = [], {name: np.array([one[name] for one in found]) for name in found[0]}
    for name, values in of_row.items():
        ndcgs, purchases = values.T
        gained = (
            ["", ""] if name == LIKENESS else [interval(x) for x in (values - of_row[LIKENESS]).T]
        )
        rows.append([name, f"{ndcgs.mean():.3f}", gained[0], f"{purchases.mean():.2f}", gained[1]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lists", type=int, default=2_000)
    options = parser.parse_args()
    timing.print_machine()
    for steps in (False, True):
        found = [of_seed(seed, options.lists, steps=steps) for seed in range(options.seeds)]
        title = "Visitors who think in steps" if steps else "Visitors to whom all counts a little"
        timing.print_table(
            title,
            ["order by", "NDCG@20", "less likeness", "purchases in 100", "less likeness"],
            table(found),
        )
    header = ["candidates", "p50, ms", "p99, ms", "without features p50, ms", "p99, ms"]
    timing.print_table("Re-ranking one list", header, latency())


if __name__ == "__main__":
    main()
