"""Which part variants play in a report: reference, text, long-tail methods, longer training."""

import numpy as np
import pytest
from helpers.finished_runs import (
    ADJUSTMENT_NAMES,
    FIRST,
    LABEL,
    NO_TEXT,
    SECOND,
    cells,
    every_adjustment,
    make_run,
)

from sicot_jax.report.page import write_report
from sicot_jax.report.runs import read_run_folder
from sicot_jax.report.variant_groups import VariantRuns
from sicot_jax.report.variant_roles import (
    choose_adjustment,
    main_text_variants,
    simplest_text_variant,
)


def test_gains_are_against_the_better_plain_baseline(tmp_path):
    """Not against one with a post-hoc adjustment, however good, and not against the first."""
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
            tmp_path / "shared_word_weights",
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
        "against doubled, of the variants without text or long-tail method the most accurate on "
        "validation." in shown
    )


@pytest.mark.parametrize(
    ("late", "expected"),
    [(20.4, "base has converged: half as many"), (20.7, "base is under-trained: half")],
)
def test_convergence_is_judged_by_a_longer_run(tmp_path, late, expected):
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
    assert f"{expected}" in shown
    assert f"gain {late - 20.1:+.2f} on validation" in shown
    assert "The same is assumed of co, trained as long." in shown
    assert "co - base" in cells(shown)
    assert "\nshort is under-trained: validation top-1 was still rising" in shown


def test_of_equal_adjustments_the_smallest_is_chosen(tmp_path):
    seen = {name: {"class_mean": 30.0} for name in ADJUSTMENT_NAMES}
    run = make_run(
        tmp_path / "co",
        FIRST,
        post_hoc=every_adjustment(FIRST),
        results={"post_hoc_on_validation": seen},
    )
    variant = VariantRuns("co", (read_run_folder(run),))
    assert choose_adjustment(variant, "logit_adjustment_") == "logit_adjustment_0"
    assert choose_adjustment(variant, "tau_norm_") == "tau_norm_0.25"


def test_co_training_of_the_paper_stands_for_text_in_any_order(tmp_path):
    runs = [
        make_run(tmp_path / "shuffled", FIRST, data={"title": "shuffled"}),
        make_run(tmp_path / "base", FIRST, loss=NO_TEXT),
        make_run(tmp_path / "tag_prediction", SECOND, loss=NO_TEXT | {"tag_prediction": 1.0}),
        make_run(tmp_path / "co", SECOND),
    ]
    variants = [VariantRuns(path.name, (read_run_folder(path),)) for path in runs]
    assert simplest_text_variant(variants, variants[1]) is variants[3]


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


def test_the_best_use_of_text_is_shown_next_to_that_of_the_paper(tmp_path):
    """By validation, without a long-tail method and with unchanged titles; the attention shown is
    of a variant that has one.
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
    variants = [VariantRuns(path.name, (read_run_folder(path),)) for path in runs]
    assert main_text_variants(variants, variants[0]) == [variants[1], variants[2]]
    assert main_text_variants(variants[:2], variants[0]) == [variants[1]]
    assert main_text_variants(variants[:1], variants[0]) == []
    assert main_text_variants([variants[0], variants[2]], variants[0]) == [variants[2]]
    assert main_text_variants(variants[::2], variants[0]) == [variants[4], variants[2]]
    write_report(runs, tmp_path / "report")
    assert (
        "## Attention over title words\n\nco. Words by"
        in (tmp_path / "report" / "report.md").read_text()
    )


def test_what_text_adds_to_a_long_tail_method(tmp_path):
    """Against the long-tail method alone, whatever the learning rates; not against the baseline,
    nor against another long-tail method.
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
        (tmp_path / "out" / "report.md")
        .read_text()
        .partition("## What text adds to long-tail methods")[2]
    )
    table = cells(section.partition("##")[0])
    assert [name for name in table if " - " in name] == ["both - balanced"]
    assert table["both - balanced"][0].startswith("~+37.50")


def other_titles(tmp_path, raw, shuffled, baseline=FIRST):
    """Returns the report's section on co-training with raw and with shuffled titles."""
    for name, best, config in [
        ("baseline", baseline, {"loss": {"mixed": 0.0}}),
        ("co_training", raw, {"loss": {"mixed": 1.0}, "data": {"title": "raw"}}),
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
        .partition("## Shuffled and masked titles")[2]
        .partition("##")[0]
    )


WRONG = np.where(LABEL == 0, 1, 0)  # every photo


@pytest.mark.parametrize(
    ("raw", "shuffled", "expected"),
    [
        (LABEL, WRONG, "and not with those of other photos, with a difference that is certain."),
        (
            LABEL,
            LABEL,
            "gains overall with titles of other photos too (shuffled): regularisation, not "
            "knowledge.",
        ),
        (WRONG, WRONG, "co-training shows no gain over baseline overall"),
    ],
)
def test_a_gain_that_stays_with_shuffled_titles_is_called_regularisation(
    tmp_path, raw, shuffled, expected
):
    section = other_titles(tmp_path, raw, shuffled, baseline=WRONG)
    assert expected in section
    gain = 100 * (np.mean(raw == LABEL) - np.mean(shuffled == LABEL))
    assert cells(section)["co-training - shuffled"][0].removeprefix("~").startswith(f"{gain:+.2f}")


def test_no_section_on_shuffled_titles_without_any(tmp_path):
    runs = [
        make_run(tmp_path / "a", FIRST, loss={"mixed": 0.0}),
        make_run(tmp_path / "b", SECOND, loss={"mixed": 1.0}),
    ]
    write_report(runs, tmp_path / "out")
    assert "Shuffled and masked titles" not in (tmp_path / "out" / "report.md").read_text()
