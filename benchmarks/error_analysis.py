"""Splits mistakes by the part of the class name that is wrong, for names "brand | article".

Command:  python -m benchmarks.error_analysis RUN...        (run folders)

Shares of the test photos, in per cent: correct; wrong in the first part of the name alone (another
brand's article of that kind); in the second alone (another article of that brand); in both. Where
nearly all mistakes keep the article, words that classes of one article share cannot help.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.finished_runs import class_groups, open_run_catalog, print_run_table
from sicot_jax.errors import InputError
from sicot_jax.training.run import read_run

SEPARATOR = " | "
HEADER = ("%", "right", "first part wrong", "second part wrong", "both wrong", "photos")


def error_shares(names: Sequence[str], label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns the shares of (correct, first part wrong, second part wrong, both wrong), float [4].

    `names` are [C], "a | b"; `label` and `predicted` int [N].
    """
    if unsplit := [name for name in names if name.count(SEPARATOR) != 1]:
        raise InputError(
            f'{len(unsplit)} of {len(names)} class names are not "a{SEPARATOR}b", such as '
            f"{unsplit[0]!r}; give such a run"
        )
    first, second = np.array([name.split(SEPARATOR) for name in names]).T
    same_first, same_second = first[label] == first[predicted], second[label] == second[predicted]
    outcomes = np.stack(
        [same_first & same_second, ~same_first & same_second, same_first & ~same_second]
    )
    means = outcomes.mean(1)
    return np.append(means, 1 - means.sum())


def measure(workdir: Path) -> list[list[str]]:
    run = read_run(workdir)
    catalog = open_run_catalog(run)
    names = [catalog.classes.sku[i] for i in range(len(catalog.classes))]
    with np.load(workdir / "predictions.npz") as file:
        label, predicted = file["label"], file["top_classes"][:, 0]
    rows = []
    for name, classes in class_groups(catalog, run).items():
        members = classes[label]
        group = error_shares(names, label[members], predicted[members]) if members.any() else []
        rows.append(
            [
                f"{workdir}: {name}",
                *(f"{100 * share:.1f}" for share in group),
                f"{members.sum():,}",
            ]
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    print_run_table(argv, measure, description=__doc__, title="Mistakes", header=HEADER)


if __name__ == "__main__":
    main()
