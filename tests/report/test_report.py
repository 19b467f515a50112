"""The report on run folders made by hand: cells, intervals, refusals and the histogram."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sicot_jax.classifier.posthoc import VARIANTS
from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.errors import InputError
from sicot_jax.report import figures
from sicot_jax.report import runs as finished
from sicot_jax.report.curve import write_curve
from sicot_jax.report.differences import GROUPS, mean_accuracy
from sicot_jax.report.document import Table, html_page, markdown_table
from sicot_jax.report.figures import plot_histogram
from sicot_jax.report.page import write_report
from sicot_jax.report.record import LARGEST, write_record
from sicot_jax.report.runs import read_finished, read_tested, still_improving
from sicot_jax.report.variant_groups import Arm, chosen_variant, plainest_with_text, shown_with_text
from sicot_jax.training.metrics import accuracy

# Class 0 is head; class 1 and 2 are tail; class 3 is tail and has neither training nor test photos.
COUNTS = np.array([9, 3, 1, 0])
LABEL = np.array([0, 0, 0, 0, 1, 1, 2, 2])
FIRST = [0, 0, 1, 1, 1, 0, 0, 0]  # best class of each photo: 2 of 4, 1 of 2, 0 of 2 right
SECOND = [0, 0, 0, 1, 1, 1, 2, 0]  # 3 of 4, 2 of 2, 1 of 2


def make_run(
    workdir,
    best,
    *,
    order=None,
    hashes=(),
    boundary=5,
    validation=(10.0, 20.0, 20.1),
    label=LABEL,
    post_hoc=None,
    results=(),
    **config,
):
    """A finished run whose photo i has best class best[i]; `order` is the order in which its photos
    are stored.

    post_hoc: variant -> its best classes; results: more of them.
    """
    order = np.arange(len(label)) if order is None else order
    best = np.asarray(best)
    rest = [[c for c in (3, 2, 1, 0) if c != b] for b in best]
    top = np.concatenate([best[:, None], rest], 1) if len(best) else np.zeros((0, 4), int)
    workdir.mkdir(parents=True)
    np.savez(
        workdir / "predictions.npz",
        image_id=np.array([f"photo {i}" for i in range(len(label))], str)[order],
        label=label[order],
        top_classes=top[order],
        train_counts=COUNTS,
        **(
            {
                "post_hoc": np.array(list(post_hoc.values())).T[order],
                "post_hoc_names": list(post_hoc),
            }
            if post_hoc
            else {}
        ),
    )
    results = {
        "accuracy": accuracy(label, top, COUNTS, boundary),
        "head_boundary": boundary,
        "hashes": {"data": "d" * 64, "class_table": "c" * 64, "test_set": "t" * 64, **dict(hashes)},
        "step": 30,
        "step_of_end": 40,
        "commit": "",
        "hardware": "1 x cpu",
        **dict(results),
    }
    (workdir / "results.json").write_text(json.dumps(results))
    (workdir / "config.json").write_text(json.dumps({"format": 1, "config": {"seed": 3} | config}))
    lines = [{"step": 10, "kind": "train", "total": 1.0}]
    steps = np.linspace(40 / len(validation), 40, len(validation)) if validation else []
    lines += [
        {"step": float(s), "kind": "validation", "overall_top1": v}
        for s, v in zip(steps, validation, strict=True)
    ]
    (workdir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def cells(table):
    """First cell -> the others, of every row."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def test_table_of_two_runs(tmp_path):
    """The second run stored its photos in another order: differences are taken photo by photo all
    the same.
    """
    first = make_run(tmp_path / "baseline", FIRST)
    second = make_run(tmp_path / "co_training", SECOND, order=np.array([7, 2, 0, 5, 1, 3, 6, 4]))
    rows = cells(write_report([first, second], tmp_path / "report"))
    assert rows["top-1 (top-3), %"] == ["overall", "head", "tail", "class mean", "few: 20 or under"]
    # Behind the best class come 3, 2, 1, 0: top-3 misses label 0 behind another class, and label 1
    # behind 0.
    assert rows["baseline"][:4] == [
        "37.50 (62.50)",
        "50.00 (50.00)",
        "25.00 (75.00)",
        "33.33 (66.67)",
    ]
    assert rows["co-training"][:4] == [
        "75.00 (87.50)",
        "75.00 (75.00)",
        "75.00 (100.00)",
        "75.00 (91.67)",
    ]
    assert rows["test photos"] == ["8", "4", "4", "3 classes", "8"]
    for row in ("baseline", "co-training", "co-training - baseline"):
        assert rows[row][4] == rows[row][0]  # no class has more than 20 photos
    gains = rows["co-training - baseline"]
    for cell, gain in zip(gains, ["+37.50", "+25.00", "+50.00", "+41.67", "+37.50"], strict=True):
        value, low, high = (
            cell.removeprefix("~").replace("[", "").replace("]", "").replace(",", "").split()
        )
        assert value == gain
        assert float(low) <= float(value) <= float(high)
        assert float(low) < float(high)
        assert cell.startswith("~") == (float(low) <= 0)  # the interval holds zero
    assert float(gains[0].split("[")[1].split(",")[0]) >= 0  # no photo got worse
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "4 classes, 1 of them head (more than 5 training photos), 13 training photos, 1 class without a test photo"
        in text
    )
    told = [
        "3",
        "0.1",
        "30",
        "of",
        "40",
        "(best",
        "on",
        "validation)",
        "dddddddddddd",
        "unknown",
        "unknown",
        "1",
        "x",
        "cpu",
    ]
    assert " ".join(cells(text.split("## Runs")[1])["baseline"]).split() == told
    assert "under-trained" not in text
    files = ["class_histogram.png", "frequency.png", "learning.png", "report.html", "report.md"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == files


def test_a_run_against_itself_differs_by_nothing(tmp_path):
    runs = [make_run(tmp_path / name, FIRST) for name in ("one", "two")]
    rows = cells(write_report(runs, tmp_path / "report"))
    assert rows["two - one"] == ["~+0.00 [+0.00, +0.00]"] * 5


def make_seeds(folder, guesses, **config):
    """One run a seed, in folders as a sweep has them."""
    return [
        make_run(folder / f"seed_{seed}", best, seed=seed, **config)
        for seed, best in enumerate(guesses)
    ]


def test_runs_that_differ_in_their_seed_alone_are_one_arm(tmp_path):
    """Means over seeds; differences seed by seed: +37.5 and 0 points, so an interval over seeds
    holds both.
    """
    runs = make_seeds(tmp_path / "baseline" / "rate_0.1", [FIRST, FIRST], loss={"mixed": 0.0})
    runs += make_seeds(tmp_path / "co" / "rate_0.2", [SECOND, FIRST])
    rows = cells(write_report(runs, tmp_path / "report"))
    assert rows["baseline"][0] == "37.50 (62.50)"
    assert rows["co"][0] == "56.25 (75.00)"
    gain, interval = rows["co - baseline"][0].split(" ", 1)
    low, high = (float(x) for x in interval.strip("[]").split(","))
    assert gain == "~+18.75"
    assert low <= 0
    assert high >= 37.5
    text = (tmp_path / "report" / "report.md").read_text()
    assert "over photos and 2 seeds" in text
    assert cells(text.split("## Runs")[1])["co/rate_0.2/seed_1"][0] == "1"


def test_seeds_that_one_arm_lacks_do_not_count(tmp_path):
    runs = make_seeds(tmp_path / "baseline", [FIRST, SECOND], loss={"mixed": 0.0}) + make_seeds(
        tmp_path / "co", [SECOND]
    )
    rows = cells(write_report(runs, tmp_path / "report"))
    assert rows["co - baseline"][0].removeprefix("~").startswith("+37.50 ")


def test_the_interval_over_seeds_holds_their_spread():
    """Two seeds whose photos all differ by -1 and by 3: draws of two seeds have means -1, 1, 3, a
    quarter, half, quarter.
    """
    difference = np.stack([np.full(50, -1.0), np.full(50, 3.0)])
    assert paired_interval(difference) == (-1.0, 3.0)
    assert paired_interval(difference, np.arange(50) // 2) == (-1.0, 3.0)
    assert paired_interval(difference[:1]) == paired_interval(difference[0]) == (-1.0, -1.0)


def test_a_record_makes_the_same_report(tmp_path):
    rng = np.random.default_rng(0)
    for name, best in [("baseline", FIRST), ("co_training", SECOND)]:
        make_run(tmp_path / "runs" / name, best, order=rng.permutation(8))
        record = write_record(tmp_path / "runs" / name, tmp_path / "records" / name)
        assert sum(path.stat().st_size for path in record.iterdir()) < LARGEST
        assert write_record(tmp_path / "runs" / name, record) == record
    tables, texts = [], []
    for folder in ("runs", "records"):
        paths = [tmp_path / folder / name for name in ("baseline", "co_training")]
        tables.append(write_report(paths, tmp_path / folder / "report"))
        texts.append((tmp_path / folder / "report" / "report.md").read_text())
        assert (
            read_finished(paths[0]).validation
            == read_finished(tmp_path / "runs" / "baseline").validation
        )
    assert tables[0] == tables[1]
    assert texts[0] == texts[1]


def test_the_record_of_a_long_run_stays_small(tmp_path):
    """A million classes, 10,000 test photos, 50,000 logged steps."""
    global_counts = np.sort(np.random.default_rng(0).zipf(1.5, 1_000_000).clip(0, 60_000))
    run = make_run(tmp_path / "run", FIRST)
    label = np.random.default_rng(1).integers(0, 1_000_000, 10_000)
    top = np.random.default_rng(2).integers(0, 1_000_000, (10_000, 10))
    image_id = np.array([f"{i:032x}" for i in range(10_000)])
    np.savez(
        run / "predictions.npz",
        image_id=image_id,
        label=label,
        top_classes=top,
        train_counts=global_counts,
    )
    with (run / "log.jsonl").open("a") as log:
        log.writelines(
            json.dumps({"step": i, "kind": "train", "total": 1.0}) + "\n" for i in range(50_000)
        )
    record = write_record(run, tmp_path / "record")
    assert sum(path.stat().st_size for path in record.iterdir()) < LARGEST
    whole, small = read_tested(run), read_tested(record)
    np.testing.assert_array_equal(small.hits, whole.hits)
    np.testing.assert_array_equal(small.label_count, whole.label_count)
    np.testing.assert_array_equal(small.class_counts, whole.class_counts)
    assert read_finished(record).validation == read_finished(run).validation


def test_a_record_that_would_be_large_is_refused(tmp_path):
    run = make_run(tmp_path / "run", FIRST)
    many = np.random.default_rng(1).integers(0, 1_000_000, 200_000)
    counts = np.ones(1_000_000, int)
    ids = np.array([f"{i:06}" for i in range(len(many))])
    np.savez(
        run / "predictions.npz",
        image_id=ids,
        label=many,
        top_classes=many[:, None],
        train_counts=counts,
    )
    with pytest.raises(
        InputError,
        match=r"would take .* bytes, wanted 307,200; train with a smaller eval.max_photos",
    ):
        write_record(run, tmp_path / "record")
    assert not (tmp_path / "record").exists()
    with pytest.raises(InputError, match="a record beside its run would overwrite it"):
        write_record(run, run)


def test_a_record_says_nothing_of_this_machine(tmp_path):
    model = {"init_from": str(tmp_path / "runs/baseline/rate_0.1/seed_3")}
    run = make_run(
        tmp_path / "run", FIRST, data={"path": str(tmp_path / "fashion.npz")}, model=model
    )
    record = write_record(run, tmp_path / "record")
    for file in record.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    config = read_finished(record).config
    assert (config["data.path"], config["model.init_from"]) == (
        "fashion.npz",
        "baseline/rate_0.1/seed_3",
    )


def test_the_record_of_many_photos_keeps_the_best_class(tmp_path):
    """Variants go first, then what stands behind the best class."""
    run, rng = make_run(tmp_path / "run", FIRST), np.random.default_rng(0)
    sizes = []
    for photos in (2_000, 20_000, 50_000):
        label, top = rng.integers(0, 20_000, photos), rng.integers(0, 20_000, (photos, 3))
        ids = np.array([f"{i:06}" for i in range(photos)])
        variants = {
            "post_hoc": rng.integers(0, 20_000, (photos, len(VARIANTS))),
            "post_hoc_names": list(VARIANTS),
        }
        counts = np.ones(20_000, int)
        np.savez(
            run / "predictions.npz",
            image_id=ids,
            label=label,
            top_classes=top,
            train_counts=counts,
            **variants,
        )
        found = read_tested(write_record(run, tmp_path / "record"))
        np.testing.assert_array_equal(found.hits, top[:, 0] == label)
        sizes.append((len(found.post_hoc), found.top_classes.shape[1]))
    assert sizes == [(len(VARIANTS), 3), (0, 3), (0, 1)]


def test_a_group_without_photos_is_a_dash(tmp_path):
    runs = [
        make_run(tmp_path / name, best, boundary=0)
        for name, best in [("one", FIRST), ("two", SECOND)]
    ]
    rows = cells(write_report(runs, tmp_path / "report"))
    assert (rows["one"][2], rows["two - one"][2], rows["test photos"][2]) == ("-", "-", "0")
    assert rows["one"][1] == rows["one"][0]


def test_one_run_alone(tmp_path):
    rows = cells(write_report([make_run(tmp_path / "one", FIRST)], tmp_path / "report"))
    assert [name for name in rows if name.strip("-")] == ["top-1 (top-3), %", "one", "test photos"]


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    paths = [tmp_path / name for name in ("small/one_seed/base", "large/one_seed/base", "large/co")]
    runs = [make_run(path, FIRST) for path in paths]
    rows = cells(write_report(runs, tmp_path / "report"))
    names = ["small/one-seed/base", "large/one-seed/base", "large/co"]
    assert set(names) < set(rows)
    assert f"{names[1]} - {names[0]}" in rows
    with pytest.raises(InputError, match=r"large/co is given twice; name each run once"):
        write_report([*runs, paths[2].parent / "co"], tmp_path / "report")


def test_what_else_differs_between_runs_is_said(tmp_path):
    """Not what has no part in the result, such as the number of devices."""
    first = make_run(
        tmp_path / "first", FIRST, loss={"mixed": 0.0}, mesh={"data": 1}, train={"epochs": 4.0}
    )
    second = make_run(
        tmp_path / "second", FIRST, loss={"mixed": 1.0}, mesh={"data": 8}, train={"epochs": 8.0}
    )
    same = make_run(
        tmp_path / "same",
        FIRST,
        loss={"mixed": 0.0},
        train={"epochs": 4.0},
        hashes={"data": "e" * 64},
    )
    shown = write_report([first, second, same], tmp_path / "report").splitlines()
    assert "second differs from first in: loss.mixed 0.0 -> 1.0, train.epochs 4.0 -> 8.0." in shown
    assert "same differs from first in: data dddddddddddd -> eeeeeeeeeeee." in shown


def test_a_run_without_validation_is_not_called_the_best(tmp_path):
    write_report([make_run(tmp_path / "one", FIRST, validation=())], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "30 of 40 (the last: no validation photos)" in text
    assert "best" not in text


@pytest.mark.parametrize("keep", [0, 3, 300, -30])
def test_a_cut_predictions_file_is_one_line(tmp_path, keep):
    run = make_run(tmp_path / "cut", FIRST)
    whole = (run / "predictions.npz").read_bytes()
    (run / "predictions.npz").write_bytes(whole[:keep])
    with pytest.raises(
        InputError,
        match=r"predictions.npz is damaged .*; write it again: sicot evaluate --workdir=",
    ):
        read_finished(run)


@pytest.mark.parametrize(
    ("key", "words"), [("test_set", "another test set"), ("class_table", "another class table")]
)
def test_runs_on_other_data_are_refused_by_name(tmp_path, key, words):
    runs = [make_run(tmp_path / name, FIRST) for name in ("one", "two")]
    runs.append(make_run(tmp_path / "odd_one", FIRST, hashes={key: "x"}.items()))
    with pytest.raises(InputError, match=rf"odd_one and one have {words}; report them apart"):
        write_report(runs, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_runs_of_several_boundaries_are_refused(tmp_path):
    runs = [make_run(tmp_path / str(b), FIRST, boundary=b) for b in (5, 2)]
    with pytest.raises(
        InputError, match=r"head boundaries \[2, 5\] in one table; set one data.head_boundary"
    ):
        write_report(runs, tmp_path / "report")


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
        read_finished(tmp_path / "nowhere")


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
    assert still_improving(read_finished(run)) == rising


def test_under_trained_run_is_named_in_the_report(tmp_path):
    run = make_run(tmp_path / "a_run", FIRST, validation=(10.0, 20.0, 30.0, 40.0))
    assert "a-run is under-trained" in write_report([run], tmp_path / "report")


def test_markdown_table():
    table = markdown_table(["name", "x"], [["a", "1.25"], ["longer", "-"]])
    assert table.splitlines() == [
        "| name   |    x |",
        "|--------|-----:|",
        "| a      | 1.25 |",
        "| longer |    - |",
    ]


RED, BLUE = (0xD1, 0x49, 0x5B), (0x30, 0x63, 0x8E)


def areas(path):
    """Pixels of the head's and of the tail's colour, the legend's small samples included."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return [int((pixels == colour).all(-1).sum()) for colour in (RED, BLUE)]


def falling(classes):
    return np.maximum(1, (500 / np.arange(1, classes + 1)).astype(int))[
        np.random.default_rng(0).permutation(classes)
    ]


@pytest.mark.parametrize(
    ("counts", "boundary", "head", "tail"),
    [
        (falling(60), 50, True, True),
        (falling(1000), 20, True, True),
        (falling(60), 0, True, False),
        (falling(60), 500, False, True),
        (np.array([40, 3, 1]), 5, True, True),  # a head of one class
        (
            np.array([40, 0]),
            5,
            True,
            False,
        ),  # the only tail class has no photo, so no area but in the legend
        (np.array([7]), 9, False, True),
    ],
)
def test_histogram_shows_head_and_tail(tmp_path, counts, boundary, head, tail):
    """A group without a class has no pixel of its colour, the others an area."""
    plot_histogram(counts, boundary, tmp_path / "histogram.png")
    in_head, in_tail = areas(tmp_path / "histogram.png")
    for area, present in [(in_head, head), (in_tail, tail)]:
        assert area > 2000 if present else area < 500


def test_histogram_of_many_classes_is_quick_and_keeps_the_head_in_sight(tmp_path):
    """A million classes, 100 of them head: on a linear axis that is a tenth of a pixel."""
    counts = np.ones(1_000_000, int)
    counts[:100] = np.arange(100, 200)
    plot_histogram(counts, 50, tmp_path / "histogram.png")
    assert all(area > 2000 for area in areas(tmp_path / "histogram.png"))


def test_groups_are_those_of_metrics():
    """And their figures, but for the group that the report alone has."""
    guesses = np.array([SECOND, FIRST]).T
    run = type("Run", (), {"results": {"head_boundary": 5}})
    tested = finished.Tested(LABEL, guesses, COUNTS[LABEL], np.sort(COUNTS)[::-1], {})
    arm = Arm("one", (finished.Finished("one", run.results, {"seed": 0}, tested, []),))
    for group, row in accuracy(LABEL, guesses, COUNTS, 5).items():
        np.testing.assert_allclose(mean_accuracy(arm, group), row["top1"], atol=1e-4)
        np.testing.assert_allclose(mean_accuracy(arm, group, top=2), row["top3"], atol=1e-4)
    assert set(GROUPS) - set(accuracy(LABEL, guesses, COUNTS, 5)) == {"few"}


NO_TEXT = {"mixed": 0.0}


def test_gains_are_against_the_better_plain_baseline(tmp_path):
    """Not against one with a remedy, however good, and not against the first."""
    right = LABEL.tolist()
    runs = [
        make_run(tmp_path / "baseline", FIRST, loss=NO_TEXT),
        make_run(
            tmp_path / "doubled",
            SECOND,
            loss=NO_TEXT | {"visual": 2.0},
            validation=(10.0, 20.0, 20.2),
        ),
        make_run(tmp_path / "balanced", right, loss=NO_TEXT | {"logit_adjustment": 1.0}),
        make_run(
            tmp_path / "square_root",
            right,
            loss=NO_TEXT,
            data={"sampling": "square_root"},
            validation=(1, 50),
        ),
        make_run(
            tmp_path / "word_rows",
            right,
            loss=NO_TEXT,
            model={"shared_word_weights": True},
            validation=(1, 50),
        ),
        make_run(tmp_path / "co", right),
    ]
    shown = write_report(runs, tmp_path / "report")
    rows = cells(shown)
    assert rows["co - doubled"][0].startswith("~+25.00")
    assert "co - baseline" not in rows
    assert (
        "against doubled, of the arms without text or remedy the most accurate on validation."
        in shown
    )


def every_variant(best, **others):
    return {name: others.get(name, best) for name in VARIANTS}


def test_remedies_after_training(tmp_path):
    """The tau with the best class mean on validation, and what text adds under the same remedy."""
    seen = {
        name: {"overall": 1.0, "head": 1.0, "tail": 1.0, "class_mean": 30.0} for name in VARIANTS
    }
    seen["tau_norm_0.5"] = {**seen["tau_norm_0.5"], "class_mean": 40.0}
    told = {"post_hoc_on_validation": seen}
    runs = [
        make_run(
            tmp_path / "base", FIRST, loss=NO_TEXT, post_hoc=every_variant(FIRST), results=told
        ),
        make_run(
            tmp_path / "co",
            FIRST,
            post_hoc=every_variant(FIRST, **{"tau_norm_0.5": SECOND}),
            results=told,
        ),
    ]
    write_report(runs, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    rows = cells(text.split("## Remedies after training")[1].split("##")[0])
    assert rows["base, tau-norm, tau by validation (0.5)"][0] == "37.50"
    assert rows["co, tau-norm, tau by validation (0.5)"][0] == "75.00"
    assert rows["co - base, each with its tau"][0].lstrip("~").startswith("+37.50 [")
    assert (tmp_path / "report" / "trade_off.png").stat().st_size > 10_000


def test_a_record_keeps_what_variants_predict(tmp_path):
    rng = np.random.default_rng(0)
    variants = {name: rng.integers(0, 4, 8) for name in VARIANTS}
    run = make_run(tmp_path / "run", FIRST, order=rng.permutation(8), post_hoc=variants)
    record = write_record(run, tmp_path / "record")
    for found in (read_tested(run), read_tested(record)):
        assert list(found.post_hoc) == list(VARIANTS)
        for name, best in variants.items():
            np.testing.assert_array_equal(found.post_hoc[name], best)


def test_text_encoders_are_set_side_by_side(tmp_path):
    """Arms that differ in the encoder, at whatever learning rate, under the best baseline; others
    are no encoder's.
    """
    runs = [make_run(tmp_path / "base", FIRST, loss=NO_TEXT)]
    for name, best, rate in [("bilinear", SECOND, 0.1), ("mean", FIRST, 0.2)]:
        text = {"text": {"encoder": name}}
        runs.append(make_run(tmp_path / name, best, model=text, optim={"learning_rate": rate}))
    runs.append(make_run(tmp_path / "masked", FIRST, data={"title": "masked"}))
    write_report(runs, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    rows = cells(text.split("## Text encoders")[1].split("##")[0])
    assert {"none (base)", "bilinear", "bilinear - none", "mean", "mean - none"} <= set(rows)
    assert rows["bilinear - none"][0].lstrip("~").startswith("+37.50 [")
    assert rows["mean - none"][0].startswith("~+0.00")


FACTS = {
    "name": "imaterialist",
    "classes": 4,
    "photos": {"train": 13, "validation": 4, "test": 8},
    "vocabulary": 5,
    "titles": 13,
    "words": {"head": 4, "tail": 3, "both": 2, "share": 0.4},
    "word_counts": [[1, 2], [7, 3]],
}
ATTENTION = {
    "highest": [{"word": "acme", "weight": 1.5, "titles": 30}],
    "lowest": [{"word": "sale", "weight": 0.5, "titles": 20}],
    "titles": [
        {
            "title": "sale acme <b>",
            "class": "acme | shirt",
            "words": [["sale", 0.5], ["acme <b>", 1.5]],
        }
    ],
}
SWALLOWED = [
    {
        "class": "acme | shirt",
        "photos": 3,
        "from": [{"class": "acme | cap", "photos": 2, "tested": 5}],
    }
]


def test_catalogue_words_and_mistakes_are_shown(tmp_path):
    """Tables 1 and Fig. 7 of SICoT, its figures on a data set of its own, and who swallows whom; in
    HTML too.
    """
    told = {"catalog": FACTS, "attention": ATTENTION, "swallowed": SWALLOWED}
    write_report([make_run(tmp_path / "co", FIRST, results=told)], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    shared = ["4 (1 head)", "13", "4", "8", "5", "2 words (40.0%)", "5"]
    assert cells(text)["imaterialist"] == shared
    assert cells(text)["co-training"] == ["58.30 (85.45)", "58.37 (85.08)", "41.86 (83.72)"]
    assert "acme \\| shirt" in text
    assert "acme \\| cap (2 of 5)" in text
    assert "- acme | shirt: acme <b> (1.50) sale (0.50)" in text  # by weight, not as written
    assert "Highest mean weight: acme (1.50)." in text
    assert "Lowest mean weight: sale (0.50)." in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "acme &lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("data:image/png;base64,") == 3


def test_the_page_needs_no_other_file(tmp_path):
    write_report([make_run(tmp_path / "one", FIRST)], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'> ]{0,10})""", page)
    assert sources
    assert all(source.startswith("data:image") for source in sources)
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page


def test_differences_are_coloured_by_what_they_show(tmp_path):
    page = html_page(
        [
            Table(
                ["a", "b"],
                [
                    ["x", "+1.00 [+0.50, +2.00]"],
                    ["y", "-1.00 [-2.00, -0.50]"],
                    ["z", "~+1.00"],
                    ["-", "-"],
                ],
            )
        ],
        tmp_path,
        title="t",
    )
    assert re.findall(r"<td class=(up|down|uncertain)>(.)", page) == [
        ("up", "+"),
        ("down", "-"),
        ("uncertain", "~"),
    ]


@pytest.mark.parametrize(
    ("late", "told"),
    [(20.4, "base has converged: half as many"), (20.7, "base is under-trained: half")],
)
def test_convergence_is_told_by_a_longer_run(tmp_path, late, told):
    """And the longer run is no baseline to be compared with, however good."""
    runs = [
        make_run(
            tmp_path / "base",
            FIRST,
            loss=NO_TEXT,
            train={"epochs": 4.0},
            validation=(10.0, 20.1, 15.0),
        ),
        make_run(
            tmp_path / "longer",
            LABEL,
            loss=NO_TEXT,
            train={"epochs": 6.0},
            optim={"learning_rate": 0.2},
            validation=(1.0, late),
        ),
        make_run(tmp_path / "co", SECOND, train={"epochs": 4.0}, validation=(1.0, 2.0, 30.0, 40.0)),
        make_run(
            tmp_path / "short", SECOND, train={"epochs": 2.0}, validation=(1.0, 2.0, 30.0, 40.0)
        ),
    ]
    shown = write_report(runs, tmp_path / "report")
    assert f"{told}" in shown
    assert f"gain {late - 20.1:+.2f} on validation" in shown
    assert "So it is taken to be with co, of the same length." in shown
    assert "co - base" in cells(shown)
    assert "\nshort is under-trained: validation top-1 was still rising" in shown


def test_arms_of_other_seeds_are_told(tmp_path):
    """Rows are means over all seeds of an arm, differences over those that both have."""
    runs = make_seeds(tmp_path / "base", [FIRST, SECOND], loss=NO_TEXT) + make_seeds(
        tmp_path / "co", [SECOND]
    )
    shown = write_report(runs, tmp_path / "report")
    assert cells(shown)["base"][0].startswith("56.25")
    assert "+37.50" in cells(shown)["co - base"][0]
    assert "Seeds (base: 0, 1; co: 0): a difference is over the seeds that both arms have" in shown


def test_of_equal_remedies_the_smallest_is_chosen(tmp_path):
    seen = {name: {"class_mean": 30.0} for name in VARIANTS}
    run = make_run(
        tmp_path / "co",
        FIRST,
        post_hoc=every_variant(FIRST),
        results={"post_hoc_on_validation": seen},
    )
    arm = Arm("co", (read_finished(run),))
    assert chosen_variant(arm, "logit_adjustment_") == "logit_adjustment_0"
    assert chosen_variant(arm, "tau_norm_") == "tau_norm_0.25"


def test_the_paper_s_co_training_stands_for_text_whatever_the_order(tmp_path):
    runs = [
        make_run(tmp_path / "shuffled", FIRST, data={"title": "shuffled"}),
        make_run(tmp_path / "base", FIRST, loss=NO_TEXT),
        make_run(tmp_path / "num_tags", SECOND, loss=NO_TEXT | {"tag_prediction": 1.0}),
        make_run(tmp_path / "co", SECOND),
    ]
    arms = [Arm(path.name, (read_finished(path),)) for path in runs]
    assert plainest_with_text(arms, arms[1]) is arms[3]


def test_beside_the_paper_s_the_best_use_of_text_is_shown(tmp_path):
    """By validation, without a remedy and with its own titles; the attention is of an arm that has
    one.
    """
    better = {"validation": (10.0, 20.0, 30.0)}
    runs = [
        make_run(tmp_path / "base", FIRST, loss=NO_TEXT),
        make_run(tmp_path / "co", FIRST, results={"attention": ATTENTION}),
        make_run(
            tmp_path / "words",
            SECOND,
            loss=NO_TEXT | {"tag_prediction": 1.0},
            model={"shared_word_weights": True},
            **better,
        ),
        make_run(
            tmp_path / "other_titles",
            FIRST,
            data={"title": "shuffled"},
            validation=(10.0, 20.0, 40.0),
        ),
        make_run(
            tmp_path / "balanced",
            SECOND,
            loss={"logit_adjustment": 1.0},
            validation=(10.0, 20.0, 50.0),
        ),
    ]
    arms = [Arm(path.name, (read_finished(path),)) for path in runs]
    assert shown_with_text(arms, arms[0]) == [arms[1], arms[2]]
    assert shown_with_text(arms[:2], arms[0]) == [arms[1]]
    assert shown_with_text(arms[:1], arms[0]) == []
    assert shown_with_text([arms[0], arms[2]], arms[0]) == [arms[2]]
    assert shown_with_text(arms[::2], arms[0]) == [arms[4], arms[2]]
    write_report(runs, tmp_path / "report")
    assert (
        "## What the attention reads\n\nco. Words in"
        in (tmp_path / "report" / "report.md").read_text()
    )


def test_one_arm_of_several_seeds_has_no_seed_s_name(tmp_path):
    rows = cells(
        write_report(make_seeds(tmp_path / "baseline", [FIRST, SECOND]), tmp_path / "report")
    )
    assert not any("seed" in name for name in rows if name.strip("-"))


def test_figures_show_the_reference_among_many_arms(tmp_path, monkeypatch):
    runs = [
        make_run(tmp_path / f"smooth_{i}", FIRST, loss=NO_TEXT | {"label_smoothing": i / 100})
        for i in range(1, 9)
    ]
    runs += [make_run(tmp_path / "base", FIRST, loss=NO_TEXT), make_run(tmp_path / "co", SECOND)]
    drawn = []
    original = figures.plot_frequency
    monkeypatch.setattr(
        figures, "plot_frequency", lambda arms, path: (drawn.extend(arms), original(arms, path))
    )
    write_report(runs, tmp_path / "report")
    assert [arm.name for arm in drawn[:3]] == ["base", "co", "smooth_1"]
    assert len(drawn) == 8
    assert "Figures show 8 of the 10 arms" in (tmp_path / "report" / "report.md").read_text()


def make_point(folder, value, co_training):
    """A baseline and a run with text on the catalogue of that informativeness: another one at every
    value.
    """
    data = {"data": f"{value}" * 16, "test_set": f"{value}" * 16}
    at = {"generated": {"informativeness": value}}
    base = make_run(
        folder / "baseline/rate_0.1/seed_3", FIRST, hashes=data, data=at, loss={"mixed": 0.0}
    )
    text = make_run(
        folder / "co_training/rate_0.2/seed_3",
        co_training,
        hashes=data,
        data=at,
        loss={"mixed": 1.0},
    )
    return [text, base]


def test_gains_over_a_field_of_the_config(tmp_path):
    runs = make_point(tmp_path / "half", 0.5, SECOND) + make_point(tmp_path / "none", 0.0, FIRST)
    table = write_curve(runs, tmp_path / "out", over="data.generated.informativeness")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if "|" in line
    ]
    gain = {row[0]: row[2] for row in rows if row[1] == "co-training - baseline"}
    assert gain["0"].startswith("~+0.00")
    assert gain["0.5"].startswith("~+37.50")  # 6 of 8 instead of 3
    assert [row[0] for row in rows[2:]] == ["0"] * 3 + ["0.5"] * 3
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 1
    with Image.open(tmp_path / "out" / "gains.png") as image:
        line = np.all(
            np.asarray(image.convert("RGB")) == (0xD5, 0x5E, 0x00), -1
        )  # colour of the first arm
        assert line.sum() > 300
    page = (tmp_path / "out" / "report.md").read_text()
    assert "one seed each, so the interval does not hold the luck of training" in page
    assert "| half/baseline/rate_0.1/seed_3 " in page
    assert "| none/baseline/rate_0.1/seed_3 " in page


def test_a_curve_wants_a_number_of_several_values(tmp_path):
    runs = make_point(tmp_path / "half", 0.5, SECOND)
    with pytest.raises(InputError, match="0.5 in all of these runs"):
        write_curve(runs, tmp_path / "out", over="data.generated.informativeness")
    with pytest.raises(InputError, match="nonsense is None, wanted a number"):
        write_curve(runs, tmp_path / "out", over="nonsense")
    with pytest.raises(InputError, match="given twice"):
        write_curve([*runs, runs[0]], tmp_path / "out", over="data.generated.informativeness")
    lone = [make_point(tmp_path / "none", 0.0, FIRST)[1], runs[1]]
    with pytest.raises(InputError, match="no value of .* has an arm beside baseline"):
        write_curve(lone, tmp_path / "out", over="data.generated.informativeness")
    texts = [tmp_path / folder / "co_training/rate_0.2/seed_3" for folder in ("none", "half")]
    with pytest.raises(InputError, match="no plain baseline at every value"):
        write_curve(texts, tmp_path / "out", over="data.generated.informativeness")
    assert not (tmp_path / "out").exists()


def test_a_curve_has_one_reference(tmp_path):
    """The doubled baseline is the better one at 0 by a little, the baseline at 0.5 by much."""
    runs = make_point(tmp_path / "half", 0.5, SECOND) + make_point(tmp_path / "none", 0.0, FIRST)
    for folder, value, top1 in [("half", 0.5, 10.0), ("none", 0.0, 21.0)]:
        data = {"data": f"{value}" * 16, "test_set": f"{value}" * 16}
        config = {
            "data": {"generated": {"informativeness": value}},
            "loss": {"mixed": 0.0, "visual": 2.0},
        }
        name = tmp_path / folder / "doubled_baseline/rate_0.1/seed_3"
        runs.append(make_run(name, FIRST, hashes=data, validation=(top1,), **config))
    table = write_curve(runs, tmp_path / "out", over="data.generated.informativeness")
    assert "- doubled-baseline" not in table
    assert table.count("doubled-baseline - baseline") == 2


def test_a_point_of_a_curve_compares_one_test_set(tmp_path):
    runs = make_point(tmp_path / "half", 0.5, SECOND) + make_point(tmp_path / "none", 0.0, FIRST)
    other = make_run(
        tmp_path / "other" / "seed_3", FIRST, data={"generated": {"informativeness": 0.0}}
    )
    with pytest.raises(InputError, match="informativeness=0 are of several data"):
        write_curve([*runs, other], tmp_path / "out", over="data.generated.informativeness")


def test_of_a_sweep_s_rates_the_best_on_validation_stands_for_the_arm(tmp_path):
    """Judged by the seed that both have; the second seed of the better one is good luck, and counts
    in the table alone.
    """

    def runs(arm, rate, seed, best, top1):
        config = {"loss": {"mixed": 0.0}, "optim": {"learning_rate": rate}, "seed": seed}
        return make_run(
            tmp_path / "sweep" / arm / f"rate_{rate:g}" / f"seed_{seed}",
            best,
            validation=(top1,),
            **config,
        )

    runs("baseline", 0.1, 0, FIRST, 30.0)
    runs("baseline", 0.2, 0, SECOND, 31.0)
    runs("baseline", 0.2, 1, SECOND, 20.0)
    text = make_run(
        tmp_path / "co_training", FIRST, loss={"mixed": 1.0}, validation=(10.0,), seed=0
    )
    table = cells(write_report([tmp_path / "sweep", text], tmp_path / "out"))
    assert table["sweep/baseline"][0].startswith("75.00")  # 6 of 8, of both seeds at 0.2
    page = (tmp_path / "out" / "report.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if "| 0.2 " in line
    ]
    # The seeds judged have 31.
    assert ["sweep/baseline", "0.2", "taken", "0", "0, 1", "31.00", "75.00"] in [
        row[:7] for row in rows
    ]
    assert "| sweep/baseline | 0.1" in page
    assert "baseline/rate-0.1 - " not in page


def rate(folder, value, seed, best, validation=(30.0,), **config):
    """A run of a sweep over learning rates."""
    run = folder / "baseline" / f"rate_{value:g}" / f"seed_{seed}"
    return make_run(
        run, best, validation=validation, optim={"learning_rate": value}, seed=seed, **config
    )


def equal_rates(tmp_path):
    """Cells of the section of that name by their first."""
    section = (
        (tmp_path / "out" / "report.md").read_text().partition("## At equal learning rates")[2]
    )
    return cells(section.partition("##")[0])


def test_at_equal_rates_no_rate_is_chosen(tmp_path):
    """The mean over shared rates and seeds; validation, which chooses 0.1 for one and 0.2 for the
    other, has no say.
    """

    def runs(arm, value, seed, best, top1, mixed):
        folder = tmp_path / "runs" / arm / f"rate_{value:g}" / f"seed_{seed}"
        config = {"loss": {"mixed": mixed}, "optim": {"learning_rate": value}, "seed": seed}
        make_run(folder, best, validation=(top1,), **config)

    runs("baseline", 0.1, 0, FIRST, 40.0, 0.0)
    runs("baseline", 0.2, 0, FIRST, 30.0, 0.0)
    runs("baseline", 0.2, 1, SECOND, 30.0, 0.0)
    runs("baseline", 0.4, 0, SECOND, 30.0, 0.0)  # a rate that the other has not
    runs("co_training", 0.1, 0, FIRST, 30.0, 1.0)
    runs("co_training", 0.2, 0, SECOND, 40.0, 1.0)
    runs("co_training", 0.2, 2, FIRST, 40.0, 1.0)  # a seed that the other has not
    write_report([tmp_path / "runs"], tmp_path / "out")
    table = equal_rates(tmp_path)
    assert [name for name in table if " - " in name] == ["co-training - baseline"]
    rates, seeds, overall, head, tail, class_mean, _ = table["co-training - baseline"]
    assert (rates, seeds) == ("0.1, 0.2", "0")
    # Nothing at 0.1; at 0.2 3 of 8, 1 of 4, 2 of 4 photos and 5 of 12 of a class.
    found = [cell.removeprefix("~").split(" [")[0] for cell in (overall, head, tail, class_mean)]
    assert found == ["+18.75", "+12.50", "+25.00", "+20.83"]


def test_one_shared_rate_is_no_table_of_equal_rates(tmp_path):
    for value in (0.1, 0.2):
        rate(tmp_path / "runs", value, 0, FIRST, loss={"mixed": 0.0})
    write_report(
        [tmp_path / "runs", make_run(tmp_path / "text", SECOND, loss={"mixed": 1.0})],
        tmp_path / "out",
    )
    assert not equal_rates(tmp_path)


def test_of_equal_rates_the_one_that_the_sweep_went_on_with_is_taken(tmp_path):
    rate(tmp_path / "runs", 0.1, 0, FIRST)
    rate(tmp_path / "runs", 0.2, 0, SECOND)
    rate(tmp_path / "runs", 0.2, 1, SECOND)
    assert "| 75.00 (" in write_report([tmp_path / "runs"], tmp_path / "out")


def test_rates_without_validation_stay_apart(tmp_path):
    for value, best in [(0.1, FIRST), (0.2, SECOND)]:
        rate(tmp_path / "runs", value, 0, best, validation=())
    table = cells(write_report([tmp_path / "runs"], tmp_path / "out"))
    assert {"baseline/rate-0.1/seed-0", "baseline/rate-0.2/seed-0"} <= set(table)


def test_a_longer_run_is_judged_by_the_rates_of_both(tmp_path):
    """At 0.1 half as many epochs again gain 2 points, though 0.2 had been better by 3."""
    rate(tmp_path / "runs", 0.1, 0, FIRST, validation=(30.0,), train={"epochs": 20.0})
    rate(tmp_path / "runs", 0.2, 0, FIRST, validation=(33.0,), train={"epochs": 20.0})
    longer = tmp_path / "runs" / "longer" / "rate_0.1" / "seed_0"
    config = {"optim": {"learning_rate": 0.1}, "train": {"epochs": 30.0}, "seed": 0}
    make_run(longer, FIRST, validation=(32.0,), **config)
    table = write_report([tmp_path / "runs"], tmp_path / "out")
    assert "baseline is under-trained: half as many epochs again (longer) gain +2.00" in table
    assert "Up to 2 learning rates were tried: baseline (2)" in table
    again = tmp_path / "runs" / "longer" / "rate_0.2" / "seed_0"  # both rates: the best of each
    make_run(again, FIRST, validation=(33.25,), **(config | {"optim": {"learning_rate": 0.2}}))
    table = write_report([tmp_path / "runs"], tmp_path / "out")
    assert "baseline has converged: half as many epochs again (longer) gain +0.25" in table


def test_a_sweep_s_folder_counts_each_run_once_and_no_diverged_one(tmp_path):
    rate(tmp_path / "runs", 0.1, 0, FIRST)
    rate(tmp_path / "records", 0.1, 0, FIRST)
    diverged = rate(tmp_path / "runs", 0.8, 0, FIRST)
    (diverged / "results.json").unlink()
    (diverged / finished.DIVERGED).write_text("loss is nan")
    assert finished.all_runs([tmp_path]) == [tmp_path / "runs/baseline/rate_0.1/seed_0"]
    assert "not a finished run" not in write_report([tmp_path], tmp_path / "out")


def test_learning_rates_that_no_sweep_made_stay_apart(tmp_path):
    fast = make_run(tmp_path / "fast", FIRST, optim={"learning_rate": 0.2})
    slow = make_run(tmp_path / "slow", SECOND, optim={"learning_rate": 0.1})
    table = cells(write_report([fast, slow], tmp_path / "out"))
    assert {"fast", "slow"} <= set(table)


def test_an_unfinished_run_in_a_folder_of_runs_is_refused_by_name(tmp_path):
    make_run(tmp_path / "runs" / "whole", FIRST)
    (make_run(tmp_path / "runs" / "cut", SECOND) / "results.json").unlink()
    with pytest.raises(InputError, match="runs/cut: not a finished run"):
        write_report([tmp_path / "runs"], tmp_path / "out")


def test_what_text_adds_to_a_remedy(tmp_path):
    """Against the remedy alone, whatever the learning rates; not against the baseline, nor against
    another remedy.
    """
    write_report(
        [
            make_run(tmp_path / "baseline", FIRST, loss={"mixed": 0.0}, validation=(50.0,)),
            make_run(tmp_path / "co_training", SECOND, loss={"mixed": 1.0}),
            make_run(tmp_path / "balanced", FIRST, loss={"mixed": 0.0, "logit_adjustment": 1.0}),
            make_run(tmp_path / "smoothed", FIRST, loss={"mixed": 0.0, "label_smoothing": 0.1}),
            make_run(
                tmp_path / "both",
                SECOND,
                loss={"mixed": 1.0, "logit_adjustment": 1.0},
                data={"title": "shuffled"},
                optim={"learning_rate": 0.2},
            ),
        ],
        tmp_path / "out",
    )
    section = (
        (tmp_path / "out" / "report.md").read_text().partition("## What text adds to a remedy")[2]
    )
    table = cells(section.partition("##")[0])
    assert [name for name in table if " - " in name] == ["both - balanced"]
    assert table["both - balanced"][0].startswith("~+37.50")


def other_titles(tmp_path, own, shuffled, baseline=FIRST):
    """The section of the report on co-training with its own titles and with those of others."""
    for name, best, config in [
        ("baseline", baseline, {"loss": {"mixed": 0.0}}),
        ("co_training", own, {"loss": {"mixed": 1.0}, "data": {"title": "raw"}}),
        (
            "shuffled",
            shuffled,
            {
                "loss": {"mixed": 1.0},
                "data": {"title": "shuffled"},
                "optim": {"learning_rate": 0.2},
            },
        ),
    ]:
        make_run(tmp_path / name, best, **config)
    write_report(
        [tmp_path / name for name in ("baseline", "co_training", "shuffled")], tmp_path / "out"
    )
    return (
        (tmp_path / "out" / "report.md")
        .read_text()
        .partition("## With other titles")[2]
        .partition("##")[0]
    )


WRONG = np.where(LABEL == 0, 1, 0)  # every photo


@pytest.mark.parametrize(
    ("own", "shuffled", "told"),
    [
        (LABEL, WRONG, "and not with those of other photos, with a difference that is certain."),
        (
            LABEL,
            LABEL,
            "gains overall with titles of other photos too (shuffled): regularisation, not knowledge.",
        ),
        (WRONG, WRONG, "co-training shows no gain over baseline overall"),
    ],
)
def test_a_gain_that_stays_with_the_titles_of_others_is_called_regularisation(
    tmp_path, own, shuffled, told
):
    section = other_titles(tmp_path, own, shuffled, baseline=WRONG)
    assert told in section
    gain = 100 * (np.mean(own == LABEL) - np.mean(shuffled == LABEL))
    assert cells(section)["co-training - shuffled"][0].removeprefix("~").startswith(f"{gain:+.2f}")


def test_without_other_titles_no_section_on_them(tmp_path):
    runs = [
        make_run(tmp_path / "a", FIRST, loss={"mixed": 0.0}),
        make_run(tmp_path / "b", SECOND, loss={"mixed": 1.0}),
    ]
    write_report(runs, tmp_path / "out")
    assert "With other titles" not in (tmp_path / "out" / "report.md").read_text()


RECORDS = Path(__file__).parents[2] / "docs" / "results" / "runs"


@pytest.mark.parametrize("data_set", sorted(path.name for path in RECORDS.iterdir()))
def test_committed_records_are_read(data_set):
    """By the code of today, whatever wrote them."""
    records = finished.all_runs([RECORDS / data_set])
    assert records
    assert all(read_finished(path).config["seed"] >= 0 for path in records)
