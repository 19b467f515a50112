"""Learning rates of a sweep: which one stands for a variant, and differences that choose none."""

from helpers.finished_runs import FIRST, SECOND, cells, make_run

from sicot_jax.report.page import find_run_folders, write_report
from sicot_jax.report.runs import DIVERGED_FILE


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
