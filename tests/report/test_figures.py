"""The class histogram: head and tail are both visible, however many classes there are."""

import numpy as np
import pytest
from helpers.finished_runs import FIRST, NO_TEXT, SECOND, make_run
from PIL import Image

from sicot_jax.report import figures
from sicot_jax.report.figures import plot_histogram
from sicot_jax.report.page import write_report

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
