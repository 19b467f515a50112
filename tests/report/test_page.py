"""The report on hand-written run folders: cells, intervals, refusals."""

import re

import numpy as np
import pytest
from helpers.finished_runs import (
    ADJUSTMENT_NAMES,
    COUNTS,
    FIRST,
    LABEL,
    NO_TEXT,
    SECOND,
    cells,
    every_adjustment,
    make_run,
    make_seeds,
)
from PIL import Image

from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.errors import InputError
from sicot_jax.report import figures, runs
from sicot_jax.report.document import Table, render_html
from sicot_jax.report.figures import plot_histogram
from sicot_jax.report.page import write_report
from sicot_jax.report.runs import GROUPS, FinishedRun
from sicot_jax.report.variant_roles import VariantRuns
from sicot_jax.training.metrics import accuracy


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
    assert float(gains[0].split("[")[1].split(",")[0]) >= 0  # no photo is ranked worse
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "4 classes, 1 of them head (more than 5 training photos), 13 training photos, "
        "1 class without a test photo" in text
    )
    expected = [
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
    assert " ".join(cells(text.split("## Runs")[1])["baseline"]).split() == expected
    assert "under-trained" not in text
    files = ["class_histogram.png", "frequency.png", "learning.png", "report.html", "report.md"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == files


def test_a_run_against_itself_differs_by_nothing(tmp_path):
    runs = [make_run(tmp_path / name, FIRST) for name in ("one", "two")]
    rows = cells(write_report(runs, tmp_path / "report"))
    assert rows["two - one"] == ["~+0.00 [+0.00, +0.00]"] * 5


def test_runs_that_differ_in_their_seed_alone_are_one_variant(tmp_path):
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


def test_seeds_that_one_variant_lacks_do_not_count(tmp_path):
    runs = make_seeds(tmp_path / "baseline", [FIRST, SECOND], loss={"mixed": 0.0}) + make_seeds(
        tmp_path / "co", [SECOND]
    )
    rows = cells(write_report(runs, tmp_path / "report"))
    assert rows["co - baseline"][0].removeprefix("~").startswith("+37.50 ")


def test_the_interval_over_seeds_covers_their_spread():
    """Two seeds whose photos all differ by -1 and by 3: draws of two seeds have means -1, 1, 3, a
    quarter, half, quarter.
    """
    difference = np.stack([np.full(50, -1.0), np.full(50, 3.0)])
    assert paired_interval(difference) == (-1.0, 3.0)
    assert paired_interval(difference, np.arange(50) // 2) == (-1.0, 3.0)
    assert paired_interval(difference[:1]) == paired_interval(difference[0]) == (-1.0, -1.0)


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


def test_runs_are_named_by_the_folders_in_which_they_differ(tmp_path):
    paths = [tmp_path / name for name in ("small/one_seed/base", "large/one_seed/base", "large/co")]
    runs = [make_run(path, FIRST) for path in paths]
    rows = cells(write_report(runs, tmp_path / "report"))
    names = ["small/one-seed/base", "large/one-seed/base", "large/co"]
    assert set(names) < set(rows)
    assert f"{names[1]} - {names[0]}" in rows
    with pytest.raises(InputError, match=r"large/co is given twice; name each run once"):
        write_report([*runs, paths[2].parent / "co"], tmp_path / "report")


def test_config_differences_between_runs_are_listed(tmp_path):
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
    assert "30 of 40 (last: no validation photos)" in text
    assert "best" not in text


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


def test_under_trained_run_is_named_in_the_report(tmp_path):
    run = make_run(tmp_path / "a_run", FIRST, validation=(10.0, 20.0, 30.0, 40.0))
    assert "a-run is under-trained" in write_report([run], tmp_path / "report")


def test_groups_are_those_of_metrics():
    """Accuracies per group are those of training/metrics; the report has one group more."""
    guesses = np.array([SECOND, FIRST]).T
    hits = guesses == LABEL[:, None]
    run = FinishedRun(
        name="one",
        config={"seed": 0},
        results={"head_boundary": 5},
        validation_log=[],
        test_set=runs.TestSet(LABEL, COUNTS[LABEL], np.sort(COUNTS)[::-1]),
        top1_hits=hits[:, 0],
        top3_hits=hits.any(-1),
    )
    variant = VariantRuns("one", (run,))
    for group, row in accuracy(LABEL, guesses, COUNTS, 5).items():
        np.testing.assert_allclose(variant.mean_accuracy(group), row["top1"], atol=1e-4)
        np.testing.assert_allclose(variant.mean_accuracy(group, top=3), row["top3"], atol=1e-4)
    assert set(GROUPS) - set(accuracy(LABEL, guesses, COUNTS, 5)) == {"few"}


def test_post_hoc_adjustments(tmp_path):
    """The tau with the best class mean on validation, and the gain of text with that adjustment."""
    seen = {
        name: {"overall": 1.0, "head": 1.0, "tail": 1.0, "class_mean": 30.0}
        for name in ADJUSTMENT_NAMES
    }
    seen["tau_norm_0.5"] = {**seen["tau_norm_0.5"], "class_mean": 40.0}
    expected = {"post_hoc_on_validation": seen}
    runs = [
        make_run(
            tmp_path / "base",
            FIRST,
            loss=NO_TEXT,
            post_hoc=every_adjustment(FIRST),
            results=expected,
        ),
        make_run(
            tmp_path / "co",
            FIRST,
            post_hoc=every_adjustment(FIRST, **{"tau_norm_0.5": SECOND}),
            results=expected,
        ),
    ]
    write_report(runs, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    rows = cells(text.split("## Post-hoc adjustments")[1].split("##")[0])
    assert rows["base, tau-norm, tau by validation (0.5)"][0] == "37.50"
    assert rows["co, tau-norm, tau by validation (0.5)"][0] == "75.00"
    assert rows["co - base, each at its tau"][0].lstrip("~").startswith("+37.50 [")
    with Image.open(tmp_path / "report" / "trade_off.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    # The line of the second variant lies on that of the first but for the adjusted point.
    assert (pixels == (0xD5, 0x5E, 0x00)).all(-1).sum() > 50


def test_text_encoders_are_set_side_by_side(tmp_path):
    """Variants that differ in the encoder, at whatever learning rate, under the best baseline;
    others are no encoder's.
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


CONFUSIONS = [
    {
        "class": "acme | shirt",
        "photos": 3,
        "from": [{"class": "acme | cap", "photos": 2, "tested": 5}],
    }
]


def test_catalogue_attention_and_confusions_are_shown(tmp_path):
    """Tables 1 and Fig. 7 of SICoT, its figures on another data set, and confusions; in
    HTML too.
    """
    expected = {"catalog": FACTS, "attention": ATTENTION, "tail_to_head_confusions": CONFUSIONS}
    write_report([make_run(tmp_path / "co", FIRST, results=expected)], tmp_path / "report")
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


def test_variants_with_different_seeds_are_listed(tmp_path):
    """Rows are means over all seeds of an variant, differences over those that both have."""
    runs = make_seeds(tmp_path / "base", [FIRST, SECOND], loss=NO_TEXT) + make_seeds(
        tmp_path / "co", [SECOND]
    )
    shown = write_report(runs, tmp_path / "report")
    assert cells(shown)["base"][0].startswith("56.25")
    assert "+37.50" in cells(shown)["co - base"][0]
    assert (
        "Seeds (base: 0, 1; co: 0): a difference is over the seeds that both variants have" in shown
    )


def test_a_variant_of_several_seeds_is_not_named_after_one(tmp_path):
    rows = cells(
        write_report(make_seeds(tmp_path / "baseline", [FIRST, SECOND]), tmp_path / "report")
    )
    assert not any("seed" in name for name in rows if name.strip("-"))


def test_an_unfinished_run_in_a_folder_of_runs_is_refused_by_name(tmp_path):
    make_run(tmp_path / "runs" / "whole", FIRST)
    (make_run(tmp_path / "runs" / "cut", SECOND) / "results.json").unlink()
    with pytest.raises(InputError, match="runs/cut: not a finished run"):
        write_report([tmp_path / "runs"], tmp_path / "out")


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
    page = render_html(
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


def test_figures_show_the_reference_among_many_variants(tmp_path, monkeypatch):
    runs = [
        make_run(tmp_path / f"smooth_{i}", FIRST, loss=NO_TEXT | {"label_smoothing": i / 100})
        for i in range(1, 9)
    ]
    runs += [make_run(tmp_path / "base", FIRST, loss=NO_TEXT), make_run(tmp_path / "co", SECOND)]
    drawn = []
    original = figures.plot_frequency
    monkeypatch.setattr(
        figures,
        "plot_frequency",
        lambda variants, path: (drawn.extend(variants), original(variants, path)),
    )
    write_report(runs, tmp_path / "report")
    assert [variant.name for variant in drawn[:3]] == ["base", "co", "smooth_1"]
    assert len(drawn) == 8
    assert "Figures show 8 of the 10 variants" in (tmp_path / "report" / "report.md").read_text()
