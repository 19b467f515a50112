"""Results of the SICoT paper (Tables 1, 2 and 4, arXiv:2102.04652), for comparison with ours."""

from __future__ import annotations

from sicot_jax.report.document import Table

HEADER = ("paper: top-1 (top-3), %", "overall", "head", "tail")

# Name of the TFDS builder -> rows. iMaterialist's tail is 43 test photos; the paper gives neither
# seeds nor intervals. Its other two data sets are private.
RESULTS: dict[str, list[list[str]]] = {
    "imaterialist": [
        ["baseline", "57.29 (83.77)", "57.38 (83.49)", "37.21 (81.40)"],
        ["co-training", "58.30 (85.45)", "58.37 (85.08)", "41.86 (83.72)"],
        ["gain", "+1.01 (+1.68)", "+0.99 (+1.59)", "+4.65 (+2.32)"],
    ],
    "webvision1k": [
        ["baseline", "62.68 (79.02)", "55.18 (72.91)", "63.04 (79.26)"],
        ["co-training", "65.95 (80.93)", "55.86 (72.55)", "66.23 (81.11)"],
        ["gain", "+3.27 (+1.91)", "+0.68 (-0.36)", "+3.19 (+1.85)"],
    ],
}


def paper_table(data_set: str) -> Table | None:
    """Returns the paper's results on a data set.

    Args:
      data_set: name of the data set as its TFDS builder is called.

    Returns:
      The paper's rows; None for a data set that the paper does not have.
    """
    return Table(HEADER, RESULTS[data_set]) if data_set in RESULTS else None
