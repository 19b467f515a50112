"""A small sweep end to end: what runs, what is chosen, what is done again."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sicot_jax import config as config_lib
from sicot_jax.catalog.open import open_catalog
from sicot_jax.cli import main as cli
from sicot_jax.config import FREE_ON_RESUME, ConfigError
from sicot_jax.errors import InputError, NotFinite
from sicot_jax.experiments import sweep
from sicot_jax.experiments.sweep import compared_configs
from sicot_jax.experiments.variants import VARIANTS, make_variant
from sicot_jax.report.run_table import read_run_table

QUICK = ["--config=tiny", "--config.train.steps=2", "--config.train.tensorboard=false"]


@pytest.mark.parametrize("name", ["tiny", "recommended"])
def test_every_variant_has_a_separate_config(name):
    config = config_lib.load_config(name)
    configs = [
        json.dumps(
            [config_lib.config_to_dict(make_variant(config, name)), VARIANTS[name].starts_from],
            sort_keys=True,
        )
        for name in VARIANTS
    ]
    assert len(set(configs)) == len(VARIANTS)
    assert not make_variant(config, "baseline").loss.with_text
    assert make_variant(config, "doubled_baseline").loss.visual == 2
    with pytest.raises(ConfigError, match="no variant cotraining; variants are baseline, "):
        make_variant(config, "cotraining")
    with pytest.raises(
        ConfigError,
        match=r"variant tag_prediction_shared_weights: model\.shared_word_weights=True with .*; or "
        "leave this variant out",
    ):
        make_variant(
            config_lib.override_config(
                config, ["model.shared_word_weights=False", "head.kind=sampled"]
            ),
            "tag_prediction_shared_weights",
        )


@pytest.mark.parametrize(
    "given", [{"variants": []}, {"rates": [1.0, 1.0]}, {"seeds": [-1]}, {"rates": [0.0]}]
)
def test_what_would_stop_a_later_run_stops_before_the_first(tmp_path, given):
    grid = {"variants": ["baseline"], "rates": [1.0], "seeds": [0]} | given
    with pytest.raises(ConfigError, match="wanted"):
        sweep.run_sweep(
            config_lib.load_config("tiny"),
            sweep.SweepGrid(**grid),
            workdir=tmp_path / "runs",
            table=tmp_path / "runs.parquet",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_trains_each_cell_once_and_reports_variants_over_seeds(tmp_path, capsys):
    """Two rates for the first seed, the best of them for the second: three runs per variant,
    which compile one step.
    """
    compiled = set(Path(jax.config.jax_compilation_cache_dir).glob("jit_train_step-*-cache"))
    grid = ["--variants", "baseline", "co_training", "--rates", "1", "2", "--seeds", "0", "1"]
    command = ["sweep", *QUICK, *grid, f"--workdir={tmp_path}"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "[6/6]" in printed.err
    assert "over photos and 2 seeds" in printed.out
    compiled_now = set(Path(jax.config.jax_compilation_cache_dir).glob("jit_train_step-*-cache"))
    assert compiled_now
    assert len(compiled_now - compiled) <= 2
    assert {
        line.split("|")[1].strip() for line in printed.out.splitlines() if line.startswith("| ")
    } >= {
        "baseline",
        "co-training",
        "co-training - baseline",
    }
    results = sorted((tmp_path / "runs").glob("*/*/*/results.json"))
    assert len(results) == 6
    rows = {run.name: run for run in read_run_table(tmp_path / "runs.parquet")}
    assert len(rows) == 6
    for name in ("baseline", "co_training"):
        tried = [row for row in rows.values() if row.name.startswith(f"{name}/") and row.seed == 0]
        best = max(tried, key=lambda row: row.best_validation_top1)
        values = {row.best_validation_top1 for row in tried}
        # Of rates that tie the first given is chosen.
        assert best.name.replace("seed_0", "seed_1") in rows or len(values) == 1
    times = {path: path.stat().st_mtime_ns for path in results}
    assert cli.main(command) == 0  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in results} == times
    assert printed.out == capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs")  # another machine, with the run table
    assert cli.main(command) == 0
    again = capsys.readouterr()
    assert printed.out == again.out
    assert again.err.count("its row in ") == 6
    assert not (tmp_path / "runs").exists()
    command = [
        "sweep",
        *QUICK,
        "--variants",
        "baseline",
        "--rates",
        "1",
        "--seeds",
        "0",
        f"--workdir={tmp_path}",
    ]
    assert (
        cli.main([*command, "--config.optim.warmup_epochs=1"]) == 0
    )  # another config is another run
    assert "its row in " not in capsys.readouterr().err
    assert len(sorted((tmp_path / "runs").glob("*/*/*/results.json"))) == 1


@pytest.mark.slow
def test_classifier_retraining_starts_from_the_run_of_its_seed(tmp_path, capsys):
    """cRT: the classifier alone, from the baseline's best rate; what is not trained stays bit for
    bit.
    """
    grid = [
        "--variants",
        "baseline",
        "classifier_retraining",
        "--rates",
        "1",
        "2",
        "--seeds",
        "0",
        "1",
    ]
    assert (
        cli.main(["sweep", *QUICK, "--config.train.steps=3", *grid, f"--workdir={tmp_path}"]) == 0
    )
    assert "[6/6]" in capsys.readouterr().err
    best = (tmp_path / "runs" / "baseline").glob("rate_*/seed_1")
    folder = next(iter(best))
    for run in (tmp_path / "runs" / "classifier_retraining").glob("after_rate_*/rate_*/seed_1"):
        config = config_lib.load_config(str(run / "config.json"))
        assert config.model.init_from == str(folder)
        assert config.optim.trainable == "classifier"
        assert config.train.steps == 1
        assert config.data.sampling == "class_balanced"
        with (
            np.load(run / "predictions.npz") as retrained,
            np.load(folder / "predictions.npz") as before,
        ):
            np.testing.assert_array_equal(retrained["embedding"], before["embedding"])
            assert (retrained["top_logits"] != before["top_logits"]).any()
    rows = (tmp_path / "report" / "report.md").read_text()
    assert "| classifier-retraining - baseline" in rows  # two seeds are one variant
    shutil.rmtree(tmp_path / "runs")
    grid = [
        "--variants",
        "baseline",
        "classifier_retraining",
        "--rates",
        "1",
        "--seeds",
        "0",
    ]  # a row of the table has no weights to start from
    assert (
        cli.main(["sweep", *QUICK, "--config.train.steps=3", *grid, f"--workdir={tmp_path}"]) == 0
    )
    assert "its row in " not in capsys.readouterr().err


def test_a_variant_is_named_after_the_one_that_it_starts_from(tmp_path):
    for variants in (["classifier_retraining"], ["classifier_retraining", "baseline"]):
        grid = sweep.SweepGrid(variants, [1.0], [0])
        message = "variant classifier_retraining starts from runs of baseline; name baseline before"
        with pytest.raises(ConfigError, match=message):
            sweep.check_grid(config_lib.load_config("tiny"), grid)


def run_with(monkeypatch, tmp_path, top1, *, config=None, **grid):
    """A sweep whose runs do nothing but have the validation accuracy top1(config); -> the cells'
    folders in their order.
    """
    trained = []

    def train(config, workdir, catalog):
        trained.append(workdir.relative_to(tmp_path))
        value = top1(config)
        if isinstance(value, Exception):
            raise value

    monkeypatch.setattr(sweep, "train", train)
    configs = {}
    original = sweep.SweepCell.config_in

    def config_in(self, workdir):
        configs[workdir / self.folder] = original(self, workdir)
        return configs[workdir / self.folder]

    monkeypatch.setattr(sweep.SweepCell, "config_in", config_in)

    def record_run(folder, name, table):
        return SimpleNamespace(name=name, best_validation_top1=top1(configs[folder]))

    monkeypatch.setattr(sweep, "record_run", record_run)
    names = sweep.run_sweep(
        config or config_lib.load_config("tiny"),
        sweep.SweepGrid(**grid),
        workdir=tmp_path,
        table=tmp_path / "runs.parquet",
    )
    return [str(path) for path in trained], names


def test_the_best_rate_of_the_first_seed_is_the_other_seeds(monkeypatch, tmp_path):
    """The rate of tiny is 0.05; the best is 0.1 for the baseline and 0.05 for co-training."""

    def top1(config):
        wanted = 0.05 if config.loss.mixed else 0.1
        return 10 - abs(config.optim.learning_rate - wanted)

    grid = {"variants": ["baseline", "co_training"], "rates": [0.5, 1.0, 2.0], "seeds": [4, 5]}
    trained, names = run_with(monkeypatch, tmp_path, top1, **grid)
    rates = ["0.025", "0.05", "0.1"]
    first = [f"{name}/rate_{rate}/seed_4" for name in grid["variants"] for rate in rates]
    others = ["baseline/rate_0.1/seed_5", "co_training/rate_0.05/seed_5"]
    assert trained == first + others
    assert names == trained


def test_a_rate_that_diverges_is_not_chosen(monkeypatch, tmp_path, capsys):
    def top1(config):
        return NotFinite("loss is nan") if config.optim.learning_rate > 0.06 else 10.0

    grid = {"variants": ["baseline"], "rates": [2.0, 1.0], "seeds": [0, 1]}
    trained, names = run_with(monkeypatch, tmp_path, top1, **grid)
    assert names == ["baseline/rate_0.05/seed_0", "baseline/rate_0.05/seed_1"]
    assert len(trained) == 3
    assert "baseline at 2 times the learning rate: loss is nan" in capsys.readouterr().err
    trained, _ = run_with(monkeypatch, tmp_path, top1, **grid)  # the answer stands
    assert "baseline/rate_0.1/seed_0" not in trained
    assert "baseline at 2 times the learning rate: loss is nan" in capsys.readouterr().err
    # Another config in its folder is another question.
    config = config_lib.override_config(config_lib.load_config("tiny"), ["optim.warmup_epochs=1"])
    trained, names = run_with(monkeypatch, tmp_path, lambda config: 10.0, config=config, **grid)
    assert "baseline/rate_0.1/seed_0" in trained
    assert "baseline/rate_0.1/seed_0" in names
    assert not (tmp_path / "baseline/rate_0.1/seed_0/diverged.json").exists()
    with pytest.raises(NotFinite):
        run_with(monkeypatch, tmp_path, top1, **grid | {"rates": [2.0]})


def test_what_the_catalogue_lacks_is_an_error_before_the_first_run(tmp_path):
    """Titles for co-training; validation photos, where a rate is to be chosen."""
    config = config_lib.load_config("tiny")
    catalog = open_catalog(config.data)
    wordless = dataclasses.replace(catalog, word_vectors=catalog.word_vectors[:1])
    with pytest.raises(ConfigError, match="the catalogue has no titles"):
        sweep.check_grid_with_catalog(
            wordless, config, sweep.SweepGrid(["baseline", "co_training"], [1.0], [0])
        )
    sweep.check_grid_with_catalog(wordless, config, sweep.SweepGrid(["baseline"], [1.0], [0]))
    empty = type("Empty", (), {"__len__": lambda self: 0})()
    unvalidated = dataclasses.replace(catalog, splits={**catalog.splits, "validation": empty})
    with pytest.raises(
        InputError,
        match="no validation photos, and a learning rate is chosen by them; give one of --rates",
    ):
        sweep.check_grid_with_catalog(
            unvalidated, config, sweep.SweepGrid(["baseline"], [1.0, 2.0], [0])
        )
    sweep.check_grid_with_catalog(unvalidated, config, sweep.SweepGrid(["baseline"], [1.0], [0]))


def differences(first, second):
    before, now = (
        config_lib.flatten_config(config_lib.config_to_dict(config)) for config in (first, second)
    )
    return {name for name in before if before[name] != now[name] and name not in FREE_ON_RESUME}


@pytest.mark.parametrize(
    ("name", "flags", "title", "changed"),
    [
        (
            "base",
            ["loss.label_smoothing=0.1", "loss.logit_adjustment=1"],
            "co_training",
            {"loss.mixed"},
        ),
        ("recommended", [], "tag_prediction", {"loss.tag_prediction", "model.shared_word_weights"}),
    ],
)
def test_configs_differ_in_their_use_of_text_alone(name, flags, title, changed):
    config = config_lib.load_config(name, flags)
    configs = compared_configs(config)
    assert list(configs) == ["baseline", title]
    assert configs[title] == config
    assert differences(configs["baseline"], config) == changed


def test_without_text_there_is_nothing_to_compare():
    config = config_lib.load_config("base", ["loss.mixed=0"])
    with pytest.raises(config_lib.ConfigError, match="comparing needs a config that uses text"):
        compared_configs(config)
    rows = dataclasses.replace(
        config, model=dataclasses.replace(config.model, shared_word_weights=True)
    )
    assert list(compared_configs(rows)) == ["baseline", "tag_prediction"]
