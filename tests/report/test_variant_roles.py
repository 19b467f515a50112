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

from sicot_jax.report.page import find_run_folders, write_report
from sicot_jax.report.runs import DIVERGED_FILE, read_run_folder
from sicot_jax.report.variant_roles import (
    VariantRuns,
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


def test_the_best_rate_of_a_sweep_stands_for_the_variant(tmp_path):
    """Judged by the seed that both have; the second seed of the better one is good luck, and counts
    in the table alone.
    """

    def runs(variant, rate, seed, best, top1):
        config = {"loss": {"mixed": 0.0}, "optim": {"learning_rate": rate}, "seed": seed}
        return make_run(
            tmp_path / "sweep" / variant / f"rate_{rate:g}" / f"seed_{seed}",
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
    assert ["sweep/baseline", "0.2", "chosen", "0", "0, 1", "31.00", "75.00"] in [
        row[:7] for row in rows
    ]
    assert "| sweep/baseline | 0.1" in page
    assert "baseline/rate-0.1 - " not in page


def make_rate_run(folder, value, seed, best, validation=(30.0,), **config):
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

    def runs(variant, value, seed, best, top1, mixed):
        folder = tmp_path / "runs" / variant / f"rate_{value:g}" / f"seed_{seed}"
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
    gains = [cell.removeprefix("~").split(" [")[0] for cell in (overall, head, tail, class_mean)]
    assert gains == ["+18.75", "+12.50", "+25.00", "+20.83"]


def test_one_shared_rate_is_no_table_of_equal_rates(tmp_path):
    for value in (0.1, 0.2):
        make_rate_run(tmp_path / "runs", value, 0, FIRST, loss={"mixed": 0.0})
    write_report(
        [tmp_path / "runs", make_run(tmp_path / "text", SECOND, loss={"mixed": 1.0})],
        tmp_path / "out",
    )
    assert not equal_rates(tmp_path)


def test_of_equally_good_rates_the_one_with_more_seeds_is_chosen(tmp_path):
    make_rate_run(tmp_path / "runs", 0.1, 0, FIRST)
    make_rate_run(tmp_path / "runs", 0.2, 0, SECOND)
    make_rate_run(tmp_path / "runs", 0.2, 1, SECOND)
    assert "| 75.00 (" in write_report([tmp_path / "runs"], tmp_path / "out")


def test_rates_without_validation_stay_apart(tmp_path):
    for value, best in [(0.1, FIRST), (0.2, SECOND)]:
        make_rate_run(tmp_path / "runs", value, 0, best, validation=())
    table = cells(write_report([tmp_path / "runs"], tmp_path / "out"))
    assert {"baseline/rate-0.1/seed-0", "baseline/rate-0.2/seed-0"} <= set(table)


def test_a_longer_run_is_judged_by_the_rates_of_both(tmp_path):
    """At 0.1 half as many epochs again gain 2 points, though 0.2 had been better by 3."""
    make_rate_run(tmp_path / "runs", 0.1, 0, FIRST, validation=(30.0,), train={"epochs": 20.0})
    make_rate_run(tmp_path / "runs", 0.2, 0, FIRST, validation=(33.0,), train={"epochs": 20.0})
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


def test_an_index_below_the_folder_is_no_run(tmp_path):
    run = make_rate_run(tmp_path / "runs", 0.1, 0, FIRST)
    model = tmp_path / "runs" / "index" / "v000001" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"format": 2, "model": {}}')
    assert find_run_folders(tmp_path / "runs") == [run]


def test_diverged_runs_of_a_folder_are_left_out(tmp_path):
    make_rate_run(tmp_path / "runs", 0.1, 0, FIRST)
    diverged = make_rate_run(tmp_path / "runs", 0.8, 0, FIRST)
    (diverged / "results.json").unlink()
    (diverged / DIVERGED_FILE).write_text("loss is nan")
    assert find_run_folders(tmp_path) == [tmp_path / "runs/baseline/rate_0.1/seed_0"]
    assert "not a finished run" not in write_report([tmp_path], tmp_path / "out")


def test_learning_rates_of_runs_outside_a_sweep_stay_apart(tmp_path):
    fast = make_run(tmp_path / "fast", FIRST, optim={"learning_rate": 0.2})
    slow = make_run(tmp_path / "slow", SECOND, optim={"learning_rate": 0.1})
    table = cells(write_report([fast, slow], tmp_path / "out"))
    assert {"fast", "slow"} <= set(table)
