"""Evaluation of finished runs: the same again, without text, on another mesh."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers.finished_runs import die_at, tiny_run_config

from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.bootstrap import paired_interval
from sicot_jax.errors import InputError
from sicot_jax.training.evaluate import evaluate_run
from sicot_jax.training.loop import train
from sicot_jax.training.metrics import accuracy


def test_many_classes_are_not_tested_with_post_hoc_adjustments(finished_run, tmp_path):
    workdir, _, results = finished_run
    shutil.copytree(workdir, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    stored["config"]["eval"]["analysis_up_to_classes"] = 10  # of 11
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    again = evaluate_run(tmp_path / "run")
    assert again["accuracy"] == results["accuracy"]
    assert again["post_hoc_on_validation"] == {}
    with np.load(tmp_path / "run" / "predictions.npz") as arrays:
        assert "post_hoc" not in arrays


def test_evaluation_again_gives_the_same_without_reading_text(finished_run, tmp_path, monkeypatch):
    """Records of the test split have no title: reading one would raise."""
    _, config, results = finished_run
    workdir = shutil.copytree(finished_run[0], tmp_path / "run")
    catalog = open_catalog(config.data)

    class NoText:
        labels = catalog.splits["test"].labels

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            record = catalog.splits["test"][index]
            return {
                k: v
                for k, v in record.items()
                if k not in ("title", "tags", "token_ids", "category")
            }

    without_text = dataclasses.replace(catalog, splits={**catalog.splits, "test": NoText()})
    monkeypatch.setattr("sicot_jax.training.evaluate.open_catalog", lambda data: without_text)
    # On eight devices instead of one.
    assert evaluate_run(workdir)["accuracy"] == results["accuracy"]


def test_an_unfinished_run_is_not_evaluated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, 4)
        with pytest.raises(ZeroDivisionError):
            train(tiny_run_config(steps=6, checkpoint_every_steps=3), tmp_path)
    with pytest.raises(
        InputError, match="trained for 3 of 6 steps; the command that started it goes on"
    ):
        evaluate_run(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_an_earlier_checkpoint_is_not_evaluated_as_the_finished_run(finished_run, tmp_path):
    """A run without validation, whose last checkpoint is damaged."""
    workdir = tmp_path / "run"
    shutil.copytree(finished_run[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "best")
    shutil.rmtree(workdir / "checkpoints" / "last" / "6" / "state")
    with pytest.raises(InputError, match="trained for 3 of 6 steps"):
        evaluate_run(workdir)


# Class 0 has 50 training photos, class 1 has 10, class 2 has 3, class 3 has 1 and no test photo.
COUNTS = np.array([50, 10, 3, 1])
LABEL = np.array([0, 0, 0, 0, 1, 2, 2])
TOP = np.array(
    [
        [0, 1, 2, 3],
        [0, 2, 1, 3],
        [1, 0, 2, 3],  # second
        [1, 2, 3, 0],  # fourth: no top-3 hit
        [1, 0, 2, 3],
        [0, 1, 2, 3],  # third
        [0, 1, 3, 2],  # fourth
    ]
)


def test_accuracy_by_hand():
    result = accuracy(LABEL, TOP, COUNTS, 10)  # class 1 with exactly 10 photos is tail
    assert result["overall"] == {
        "top1": round(300 / 7, 4),
        "top3": round(500 / 7, 4),
        "photos": 7,
        "classes": 3,
    }
    assert result["head"] == {"top1": 50.0, "top3": 75.0, "photos": 4, "classes": 1}
    assert result["tail"] == {
        "top1": round(100 / 3, 4),
        "top3": round(200 / 3, 4),
        "photos": 3,
        "classes": 2,
    }
    # Class by class: top-1 2/4, 1/1, 0/2; top-3 3/4, 1/1, 1/2.
    assert result["class_mean"] == {"top1": 50.0, "top3": 75.0, "photos": 7, "classes": 3}


@pytest.mark.parametrize(("boundary", "full", "empty"), [(0, "head", "tail"), (50, "tail", "head")])
def test_an_empty_group_has_no_figure(boundary, full, empty):
    result = accuracy(LABEL, TOP, COUNTS, boundary)
    assert result[empty] == {"top1": None, "top3": None, "photos": 0, "classes": 0}
    assert result[full] == result["overall"]


def test_no_photo_at_all():
    result = accuracy(np.zeros(0, np.int32), np.zeros((0, 4), np.int32), COUNTS, 10)
    for row in result.values():
        assert row == {"top1": None, "top3": None, "photos": 0, "classes": 0}


def test_fewer_candidates_than_three():
    result = accuracy(LABEL, TOP[:, :2], COUNTS, 10)["overall"]
    assert (result["top1"], result["top3"]) == (round(300 / 7, 4), round(400 / 7, 4))


@pytest.mark.parametrize("groups", [None, np.array([0, 0, 1, 3, 3])])
def test_interval_of_equal_runs_is_zero(groups):
    assert paired_interval(np.zeros(5), groups) == (0.0, 0.0)
    np.testing.assert_allclose(paired_interval(np.full(5, 100.0), groups), [100, 100], rtol=1e-12)


@pytest.mark.parametrize("groups", [None, np.zeros(0, int)])
def test_interval_without_photos(groups):
    assert np.isnan(paired_interval(np.zeros(0), groups)).all()


@pytest.mark.parametrize("groups", [None, np.arange(400)])
def test_interval_has_the_width_of_a_mean(groups):
    """400 photos (of 400 classes: the same), half +100, half -100: deviation of the mean 5, so +-
    9.8.
    """
    difference = np.tile([100.0, -100.0], 200)
    low, high = paired_interval(difference, groups)
    # Means move in steps of 0.5, and quantiles of 2,000 resamples are off by some 3 % of a
    # deviation of 5.
    np.testing.assert_allclose([low, high], [-9.8, 9.8], atol=0.8)
    assert paired_interval(difference, groups) == (low, high)
    assert paired_interval(difference, groups, seed=1) != (low, high)


@pytest.mark.parametrize("per_class", [None, 15, 1])
def test_interval_contains_the_truth_as_often_as_it_says(per_class):
    """Differences -100, 0, 100 with mean 10: 95 % of intervals hold it, 38 of 40; less than 34 is
    one chance in 300.
    """
    rng = np.random.default_rng(0)
    groups = None if per_class is None else np.arange(300) % (300 // per_class)
    held = 0
    for seed in range(40):
        difference = rng.choice([-100.0, 0.0, 100.0], 300, p=[0.2, 0.5, 0.3])
        low, high = paired_interval(difference, groups, seed=seed)
        assert low < difference.mean() < high
        held += low <= 10 <= high
    assert held >= 34


def test_interval_over_classes_is_about_the_mean_of_classes():
    """One class of 90 photos lost, nine of one photo each won: by photo -82, by class +80."""
    groups = np.array([0] * 90 + list(range(1, 10)))
    difference = np.where(groups == 0, -100.0, 100.0)
    order = np.random.default_rng(0).permutation(99)
    low, high = paired_interval(difference[order], groups[order])
    assert 40 < low < 80 < high <= 100
    low, high = paired_interval(difference)
    assert -100 <= low < 100 * (9 - 90) / 99 < high < -60
