"""The run table makes the reports that run folders make, is small, and is what docs/results has."""

import json
import re
import runpy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.finished_runs import ADJUSTMENT_NAMES, FIRST, SECOND, make_run
from pyarrow import parquet

from sicot_jax.errors import InputError
from sicot_jax.report.differences import variant_differences
from sicot_jax.report.page import read_runs, write_report
from sicot_jax.report.run_table import TEST_SETS_FILE, add_to_run_table, read_run_table
from sicot_jax.report.runs import is_still_improving, read_run_folder
from sicot_jax.report.variant_roles import VariantRuns

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def two_runs(folder):
    """Writes a baseline and a co-training run with photos in several orders."""
    rng = np.random.default_rng(0)
    return [
        make_run(
            folder / name,
            best,
            order=rng.permutation(8),
            post_hoc={adjustment: rng.integers(0, 4, 8) for adjustment in ADJUSTMENT_NAMES},
            loss={"mixed": mixed},
        )
        for name, best, mixed in [("baseline", FIRST, 0.0), ("co_training", SECOND, 1.0)]
    ]


def test_a_table_makes_the_same_report_as_run_folders(tmp_path):
    paths, table = two_runs(tmp_path / "runs"), tmp_path / "runs.parquet"
    add_to_run_table(table, [read_run_folder(path) for path in paths])
    shown = [write_report(inputs, tmp_path / out) for inputs, out in [(paths, "a"), ([table], "b")]]
    assert shown[0] == shown[1]
    pages = [(tmp_path / out / "report.md").read_text() for out in ("a", "b")]
    assert pages[0] == pages[1]
    assert "## Post-hoc adjustments" in pages[0]


def test_a_row_keeps_what_a_report_needs(tmp_path):
    table = tmp_path / "new" / "runs.parquet"
    runs = [read_run_folder(path) for path in two_runs(tmp_path / "runs")]
    add_to_run_table(table, runs)
    for run, row in zip(runs, read_run_table(table), strict=True):
        assert (row.name, row.config, row.results) == (run.name, run.config, run.results)
        assert row.validation_curve == run.validation_curve
        assert list(row.adjusted_hits) == ADJUSTMENT_NAMES
        for name in ("label", "label_count", "class_counts"):
            np.testing.assert_array_equal(getattr(row.test_set, name), getattr(run.test_set, name))
        np.testing.assert_array_equal(row.top1_hits, run.top1_hits)
        np.testing.assert_array_equal(row.top3_hits, run.top3_hits)
        for name, hits in run.adjusted_hits.items():
            np.testing.assert_array_equal(row.adjusted_hits[name], hits)
        assert row.top1_hits.dtype == bool
    rows = parquet.read_table(table).to_pylist()
    assert [row["overall_top1"] for row in rows] == [37.5, 75.0]
    assert len(parquet.read_table(table.parent / TEST_SETS_FILE)) == 1  # both runs have the same


def test_a_run_is_a_row_that_its_next_version_replaces(tmp_path):
    table = tmp_path / "runs.parquet"
    for folder, best in [("old", FIRST), ("new", SECOND)]:
        add_to_run_table(table, [read_run_folder(make_run(tmp_path / folder / "run", best))])
    (row,) = read_run_table(table)
    assert row.top1_hits.mean() == 0.75


def add_run(table, folder):
    """Adds the run of a folder, in a separate process."""
    add_to_run_table(table, [read_run_folder(folder)])


def test_processes_that_write_one_table_lose_no_row(tmp_path):
    folders = [make_run(tmp_path / f"run_{i}", FIRST) for i in range(4)]
    table = tmp_path / "runs.parquet"
    with ProcessPoolExecutor(4, get_context("forkserver")) as pool:
        list(pool.map(add_run, [table] * 4, folders))
    assert [run.name for run in read_run_table(table)] == [folder.name for folder in folders]
    assert not list(tmp_path.glob(".*"))


def test_the_row_of_a_large_run_is_small(tmp_path):
    """A million classes and 200,000 test photos take a bit per photo and adjustment."""
    run, rng = make_run(tmp_path / "run", FIRST), np.random.default_rng(0)
    label = rng.integers(0, 1_000_000, 200_000)
    np.savez(
        run / "predictions.npz",
        image_id=np.array([f"{i:06}" for i in range(len(label))]),
        label=label,
        top_classes=rng.integers(0, 1_000_000, (len(label), 10)),
        train_counts=np.sort(rng.zipf(1.5, 1_000_000).clip(0, 60_000)),
        post_hoc=rng.integers(0, 1_000_000, (len(label), len(ADJUSTMENT_NAMES))),
        post_hoc_names=ADJUSTMENT_NAMES,
    )
    table = tmp_path / "runs.parquet"
    finished = read_run_folder(run)
    add_to_run_table(table, [finished])
    assert table.stat().st_size < 17 * 200_000 / 8
    (row,) = read_run_table(table)
    np.testing.assert_array_equal(row.top1_hits, finished.top1_hits)
    np.testing.assert_array_equal(row.test_set.class_counts, finished.test_set.class_counts)


def test_a_table_says_nothing_of_this_machine(tmp_path):
    model = {"init_from": str(tmp_path / "runs/baseline/rate_0.1/seed_3")}
    data = {"path": str(tmp_path / "fashion.npz")}
    table = tmp_path / "runs.parquet"
    run = make_run(tmp_path / "run", FIRST, data=data, model=model)
    add_to_run_table(table, [read_run_folder(run)])
    assert str(tmp_path) not in json.dumps(parquet.read_table(table).to_pylist(), default=str)
    (row,) = read_run_table(table)
    assert row.config["data.path"] == "fashion.npz"
    assert row.config["model.init_from"] == "baseline/rate_0.1/seed_3"


def test_runs_of_a_table_are_selected_by_name_or_folder(tmp_path):
    names = [f"small/base/rate_0.1/seed_{seed}" for seed in (0, 1)] + ["large/base/rate_0.1/seed_0"]
    table = tmp_path / "runs.parquet"
    folders = [make_run(tmp_path / name, FIRST) for name in names]
    add_to_run_table(table, read_runs(folders))
    for select, wanted in [
        ([], sorted(names)),
        (["small"], names[:2]),
        (["*/base/*/seed_0"], [names[2], names[0]]),
        (["small/*/*/seed_1", "large"], names[1:]),
        ([names[1]], [names[1]]),
    ]:
        assert [run.name for run in read_run_table(table, select)] == wanted
    with pytest.raises(InputError, match=r"no run matches 'medium'; runs are below large, small"):
        read_run_table(table, ["medium"])
    with pytest.raises(InputError, match="--select chooses runs of a run table"):
        read_runs([tmp_path / "small"], ["small"])
    # Names in a report are those of a folder of runs.
    assert {run.name for run in read_runs([table], ["small"])} == {
        "base/rate_0.1/seed_0",
        "base/rate_0.1/seed_1",
    }


def test_a_file_that_is_no_run_table_is_refused_in_one_line(tmp_path):
    table = tmp_path / "runs.parquet"
    with pytest.raises(InputError, match="no such file, wanted a run table"):
        read_run_table(table)
    table.write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="wanted a run table") as error:
        read_run_table(table)
    assert "\n" not in str(error.value)
    parquet.write_table(pa.table({"name": ["one"]}), table)
    with pytest.raises(InputError, match=r"no column variant, .*; wanted a run table"):
        read_run_table(table)


def test_a_table_without_its_test_sets_is_refused(tmp_path):
    table = tmp_path / "runs.parquet"
    add_to_run_table(table, [read_run_folder(make_run(tmp_path / "run", FIRST))])
    (tmp_path / TEST_SETS_FILE).unlink()
    with pytest.raises(InputError, match=r"test_sets.parquet: lacks test set .*; copy both files"):
        read_run_table(table)


def test_committed_runs_are_read():
    runs = read_run_table(RESULTS / "runs.parquet")
    assert len(runs) == 249
    for run in runs:
        accuracy = run.results["accuracy"]["overall"]
        assert accuracy["photos"] == len(run.top1_hits)
        np.testing.assert_allclose(100 * run.top1_hits.mean(), accuracy["top1"], atol=1e-4)
        np.testing.assert_allclose(100 * run.top3_hits.mean(), accuracy["top3"], atol=1e-4)


_10K = "generated_10k/30000_photos_informativeness_"
# Comparisons that the page quotes beside the reports: (reference, other).
BESIDE_THE_REPORTS = [
    *(
        (f"{_10K}{runs[0]}/baseline{runs[1]}", f"{_10K}{runs[0]}/{variant}{runs[1]}")
        for runs in (("0.5", "/rate_0.1/seed_0"), ("1_no_shared_words", ""))
        for variant in ("tag_prediction_shared_weights", "co_training")
    ),
    ("grocery_small/co_training/rate_0.05", "grocery_sentencepiece/co_training/rate_0.05"),
]
# Of options that no longer exist; the page names the commit with their records.
NOT_IN_THE_TABLE = {
    "-0.04 [-2.37, +2.33]",
    "-0.10 [-1.51, +1.37]",
    "+0.08 [-1.49, +1.65]",
    "+0.64 [-1.49, +2.94]",
    "+0.50 [-2.21, +3.10]",
    "-1.53 [-3.94, +0.56]",
}


def gains_of(reference, other):
    """Gains of all groups as the page shows them."""
    first, second = (
        VariantRuns(name, tuple(read_run_table(RESULTS / "runs.parquet", [name])))
        for name in (reference, other)
    )
    gains = variant_differences(first, second).values()
    return {f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" for mean, low, high in gains}


@pytest.mark.slow
def test_gains_that_the_results_quote_come_from_the_table(tmp_path):
    """Every gain with an interval on the page about titles, to the digit."""
    runpy.run_path(str(RESULTS.parent / "hooks" / "reports.py"))["write_reports"](tmp_path)
    made = "".join(path.read_text() for path in tmp_path.glob("*/report.md"))
    beside = set().union(*(gains_of(*pair) for pair in BESIDE_THE_REPORTS))
    gain = r"[-+]\d+\.\d\d \[[-+]\d+\.\d\d, [-+]\d+\.\d\d\]"
    quoted = set(re.findall(gain, (RESULTS / "titles.md").read_text()))
    assert len(quoted) > 100
    missing = {gain for gain in quoted - beside if gain not in made}
    assert missing == NOT_IN_THE_TABLE


@pytest.mark.parametrize("keep", [0, 3, 300, -30])
def test_a_damaged_predictions_file_is_a_one_line_error(tmp_path, keep):
    run = make_run(tmp_path / "cut", FIRST)
    content = (run / "predictions.npz").read_bytes()
    (run / "predictions.npz").write_bytes(content[:keep])
    with pytest.raises(
        InputError,
        match=r"predictions.npz is damaged .*; write it again: sicot evaluate run --workdir=",
    ):
        read_run_folder(run)


@pytest.mark.parametrize("missing", ["results.json", "config.json", "predictions.npz", "log.jsonl"])
def test_unfinished_run_is_refused_by_name(tmp_path, missing):
    run = make_run(tmp_path / "half_done", FIRST)
    (run / missing).unlink()
    with pytest.raises(
        InputError,
        match=rf"half_done: not a finished run, {missing} is missing; train it to its end",
    ):
        write_report([make_run(tmp_path / "one", FIRST), run], tmp_path / "report")
    with pytest.raises(InputError, match=r"nowhere: not a finished run"):
        read_run_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("validation", "rising"),
    [
        ((10.0, 20.0, 20.4, 20.8), False),
        ((10.0, 20.0, 20.2, 20.8), True),
        ((30.0, 20.0, 20.0, 29.0), False),
        ((40.0,), False),
        ((), False),
    ],
)
def test_still_improving(tmp_path, validation, rising):
    """The last of four validations is in the last quarter; it must beat the best before by more
    than half a point.
    """
    run = make_run(tmp_path / "a_run", FIRST, validation=validation)
    assert is_still_improving(read_run_folder(run)) == rising
