"""`sicot events triplets`: what was clicked rather than what, from events, as training data.

Parquet, a row per triplet, those of one click together and clicks in random order:

    request_id            string   request of the list; a kept photo is named by it
    query_image_id        string   the query photo
    clicked               string   SKU that was shown and clicked
    not_clicked           string   SKU of the same list that was examined and not clicked
    weight                float32  see below; those of a click's triplets sum to the click's weight
    clicked_position      int32    from 1
    not_clicked_position  int32    from 1
    bought                bool     whether the clicked item was bought too

Rules, in this order:

1. Bots: visitors beyond a limit on any day are left out (`bots.find_bots`).
2. Views: the first impression of a request that has a query photo. Clicks: on an item of that list,
   not before it; a visitor's clicks on one item for one query photo are one; a purchase is a click
   too.
3. Weight of a click: the inverse examination propensity of its position, at most `max_weight`
   (`propensity.estimate_propensity`), times `purchase_weight` where the item was bought. So the
   clicks of an item weigh, on average, what its relevance says, whatever its position.
4. Negatives: items above a click, at most `max_skips` positions, and the next one below, since they
   were examined; without items that the same query clicks in any other list, and without the same
   product as the clicked one (`products`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sicot_jax.common.files import check_not_there, scratch_directory
from sicot_jax.common.text import markdown_table
from sicot_jax.errors import InputError
from sicot_jax.events.bots import BotLimits
from sicot_jax.events.duckdb_engine import events_as_parquet, open_duckdb, sql_files
from sicot_jax.events.propensity import (
    ExaminationPropensity,
    estimate_propensity,
    power_law_propensity,
)
from sicot_jax.events.store import PURCHASE_WEIGHT
from sicot_jax.events.triplet_tables import (
    count_by_pair_and_position,
    count_by_position,
    create_bots,
    create_clicks,
    create_pairs,
    fetch_row,
    read_product_table,
    write_triplets,
)

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class TripletSettings:
    """How triplets are made.

    Attributes:
      bot_limits: limits beyond which a visitor is left out.
      eta: examination propensities r^-eta instead of an estimate; None to estimate them.
      max_weight: largest inverse propensity.
      purchase_weight: clicks that a purchase is worth.
      max_skips: positions above a click that count as examined.
      products: table with the columns sku and product: which SKUs are one product.
      memory_mb: working memory, MB; more goes to disk.
      threads: threads to use; 0 for as many as there are cores.
    """

    bot_limits: BotLimits = dataclasses.field(default_factory=BotLimits)
    eta: float | None = None
    max_weight: float = 10.0
    purchase_weight: float = PURCHASE_WEIGHT
    max_skips: int = 10
    products: Path | None = None
    memory_mb: int = 1000
    threads: int = 0

    def __post_init__(self) -> None:
        for flag, value, minimum in (
            ("--max-weight", self.max_weight, 1),
            ("--purchase-weight", self.purchase_weight, 0),
            ("--max-skips", self.max_skips, 1),
            ("--eta", self.eta or 0, 0),
        ):
            if not value >= minimum:
                raise InputError(f"{flag} {value}, wanted at least {minimum}")


@dataclasses.dataclass(frozen=True)
class TripletReport:
    """What triplets were made from; R positions.

    Attributes:
      bots: reason -> visitors left out as bots; a visitor may have several reasons.
      num_bots: visitors left out.
      bot_views: lists that they were shown.
      views: lists of the others.
      clicks: their clicks.
      purchases: clicks that became a purchase.
      triplets: rows of the file.
      excluded: reason -> items that were examined and not clicked, but are no negatives.
      propensity: examination propensity by position.
      weights: float64 [R], weight of a click by position.
      views_at: int [R], views by position.
      clicks_at: int [R], clicks by position.
    """

    bots: dict[str, int]
    num_bots: int
    bot_views: int
    views: int
    clicks: int
    purchases: int
    triplets: int
    excluded: dict[str, int]
    propensity: ExaminationPropensity
    weights: np.ndarray
    views_at: np.ndarray
    clicks_at: np.ndarray

    def summary(self) -> str:
        """Returns the counts in one line.

        Returns:
          Triplets, clicks, lists, bots and how propensities were obtained.
        """
        return (
            f"{self.triplets:,} triplets of {self.clicks:,} clicks ({self.purchases:,} bought) in "
            f"{self.views:,} lists; left out: {self.num_bots:,} bots with {self.bot_views:,} "
            f"lists; propensities: {self.propensity.source}"
        )

    def markdown(self) -> str:
        """Returns the report as a Markdown page.

        Returns:
          The summary and tables of bots, excluded negatives and positions.
        """
        rows = []
        for i, (low, high) in enumerate(self.propensity.intervals()):
            rate = 100 * self.clicks_at[i] / max(self.views_at[i], 1)
            interval = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
            rows.append(
                [
                    str(i + 1),
                    f"{self.views_at[i]:,}",
                    f"{rate:.2f}",
                    f"{self.propensity.propensity[i]:.3f}{interval}",
                    f"{self.weights[i]:.2f}",
                    f"{rate * self.weights[i]:.2f}",
                ]
            )
        header = ["position", "views", "clicks, %", "propensity, first is 1", "weight"]
        header.append("weighted clicks, %")
        tables = [
            markdown_table(["bots, by", "visitors"], _count_rows(self.bots)),
            markdown_table(
                ["examined and not clicked, but no negative", "items"], _count_rows(self.excluded)
            ),
            markdown_table(header, rows, texts=0),
        ]
        return "\n\n".join(["# Triplets", f"{self.summary()}.", *tables]) + "\n"


def make_triplets(
    events: Path, out: Path, settings: TripletSettings = TripletSettings()
) -> TripletReport:
    """Writes (query, clicked, skipped) rows as a Parquet file, and a report next to it (.md).

    Args:
      events: Parquet file of events, folder of `sicot events import`, or SQLite file of a service.
      out: file to make; both files are there in the end, or neither.
      settings: how triplets are made.

    Returns:
      Counts of lists, clicks, bots and triplets, and the weight of a click by position.

    Raises:
      InputError: no events, or none that make a triplet.
    """
    report_path = out.with_suffix(".md")
    for path in (out, report_path):
        check_not_there(path)
    products = settings.products and read_product_table(settings.products)
    with scratch_directory(out) as work:
        with open_duckdb(work, memory_mb=settings.memory_mb, threads=settings.threads) as database:
            parquet = events_as_parquet(events, work)
            report = _make_triplets(database, parquet, work / "triplets", settings, products)
        if not report.triplets:
            raise InputError(
                f"{events}: no triplet in {report.views:,} lists with {report.clicks:,} clicks; "
                "wanted clicks below or above items that are not clicked"
            )
        (work / "report").write_text(report.markdown())
        (work / "report").rename(report_path)
        (work / "triplets").rename(out)
    return report


def _count_rows(counts: dict[str, int]) -> list[list[str]]:
    return [[reason, f"{count:,}"] for reason, count in counts.items()]


def _make_triplets(
    database: duckdb.DuckDBPyConnection,
    events: Path,
    out: Path,
    settings: TripletSettings,
    products: pa.Table | None,
) -> TripletReport:
    database.execute(
        "CREATE VIEW events AS SELECT *, file_row_number AS row "
        f"FROM read_parquet({sql_files(events)}, file_row_number=true)"
    )
    bots = create_bots(database, settings.bot_limits)
    create_clicks(database)
    views_at, clicks_at = count_by_position(database)
    propensity = (
        power_law_propensity(len(views_at), settings.eta)
        if settings.eta is not None
        else estimate_propensity(count_by_pair_and_position(database), num_positions=len(views_at))
    )
    weights = propensity.weights(settings.max_weight)
    excluded = create_pairs(database, max_skips=settings.max_skips, products=products)
    write_triplets(database, out, weights, settings.purchase_weight)
    (bot_views,) = fetch_row(
        database,
        "SELECT count(*) FROM events SEMI JOIN bots USING (visitor) WHERE kind = 'impression'",
    )
    (num_bots,) = fetch_row(database, "SELECT count(*) FROM bots")
    (views,) = fetch_row(database, "SELECT count(*) FROM views")
    clicks, purchases = fetch_row(
        database, "SELECT count(*), count(*) FILTER (bought) FROM unique_clicks"
    )
    (triplets,) = fetch_row(database, f"SELECT count(*) FROM read_parquet({sql_files(out)})")
    return TripletReport(
        bots=bots,
        num_bots=num_bots,
        bot_views=bot_views,
        views=views,
        clicks=clicks,
        purchases=purchases,
        triplets=triplets,
        excluded=excluded,
        propensity=propensity,
        weights=weights,
        views_at=views_at,
        clicks_at=clicks_at,
    )
