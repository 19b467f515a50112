"""Evaluation of finished runs: the same again, without text, on another mesh."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers.training_runs import die_at, tiny_run_config

from sicot_jax.catalog.open import open_catalog
from sicot_jax.errors import InputError
from sicot_jax.training.evaluate import evaluate_run
from sicot_jax.training.loop import train


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
