"""Which part of a class name mistakes get wrong: on Fashion, whose classes are "brand | article".

python -m benchmarks.error_analysis RUN... (run folders, not records)

Shares of the test photos, in %: right; wrong in the first part of the name alone (another brand's
article of that kind); in the second alone (another article of that brand); both wrong. Where nearly
all mistakes keep the article, words that classes of one article share have nothing left to teach.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.finished_runs import catalog_of, class_groups, print_of_each
from sicot_jax.errors import InputError
from sicot_jax.training import run as runs

SEPARATOR = " | "
HEADER = ("%", "right", "first part wrong", "second part wrong", "both wrong", "photos")


def shares(names: Sequence[str], label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Names "a | b" [C], int [N], int [N] -> shares of (right, a alone wrong, b alone wrong, both
    wrong), float [4].
    """
    if odd := [name for name in names if name.count(SEPARATOR) != 1]:
        raise InputError(
            f'{len(odd)} of {len(names)} class names are not "a{SEPARATOR}b", such as {odd[0]!r}; give such a run'
        )
    first, second = np.array([name.split(SEPARATOR) for name in names]).T
    same_first, same_second = first[label] == first[predicted], second[label] == second[predicted]
    kinds = np.stack(
        [same_first & same_second, ~same_first & same_second, same_first & ~same_second]
    )
    found = kinds.mean(1)
    return np.append(found, 1 - found.sum())


def measure(workdir: Path) -> list[list[str]]:
    run = runs.read_run(workdir)
    catalog = catalog_of(run)
    names = [catalog.classes.sku[i] for i in range(len(catalog.classes))]
    with np.load(workdir / "predictions.npz") as file:
        label, predicted = file["label"], file["top_classes"][:, 0]
    rows = []
    for name, classes in class_groups(catalog, run).items():
        members = classes[label]
        of_group = shares(names, label[members], predicted[members]) if members.any() else []
        rows.append(
            [
                f"{workdir}: {name}",
                *(f"{100 * share:.1f}" for share in of_group),
                f"{members.sum():,}",
            ]
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    print_of_each(argv, measure, description=__doc__, title="Mistakes", header=HEADER)


if __name__ == "__main__":
    main()
