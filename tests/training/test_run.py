"""The run folder: another run in it is refused, by name; the lock."""

import dataclasses
import json
import shutil
import subprocess

import jax
import numpy as np
import pytest
from helpers.finished_runs import ROOT, tiny_run_config

from sicot_jax import config as config_lib
from sicot_jax.catalog.open import open_catalog
from sicot_jax.catalog.sources import tables
from sicot_jax.catalog.tokenizer import WordTokenizer
from sicot_jax.config import ConfigError
from sicot_jax.training.evaluate import evaluate_locked_run
from sicot_jax.training.loop import train
from sicot_jax.training.provenance import code_commit
from sicot_jax.training.run import mesh_of_config, read_run, run_lock, version_hint


def test_another_config_in_the_same_workdir_is_refused_by_name(finished_run):
    workdir, config, _ = finished_run
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=0.2))
    with pytest.raises(ConfigError, match=r"optim.learning_rate: 0.05 -> 0.2"):
        train(other, workdir)


def test_a_field_that_a_run_lacks_has_its_default(tmp_path, finished_run, capsys):
    workdir = tmp_path / "run"
    original, config, _ = finished_run
    shutil.copytree(original, workdir)
    stored = json.loads((workdir / "config.json").read_text())
    del stored["config"]["train"]["gradient_ratio"]
    (workdir / "config.json").write_text(json.dumps(stored))
    train(config, workdir)
    assert "finished before" in "".join(capsys.readouterr())
    with pytest.raises(
        ConfigError, match=r"holds another run \(train.gradient_ratio: 1.0 -> 0.5\)"
    ):
        train(
            dataclasses.replace(
                config, train=dataclasses.replace(config.train, gradient_ratio=0.5)
            ),
            workdir,
        )


def with_other_words(catalog):
    """The same data, as another version of sentencepiece would cut its titles."""
    tokenizer = WordTokenizer(["", *catalog.tokenizer.vocabulary[:0:-1]])
    return dataclasses.replace(catalog, tokenizer=tokenizer)


def test_a_catalogue_with_other_words_is_not_resumed_and_says_why(finished_run):
    workdir, config, _ = finished_run
    assert config.loss.with_text
    catalog = with_other_words(open_catalog(config.data))
    with pytest.raises(ConfigError, match=r"words of equal titles: \w+ -> \w+.*sentencepiece"):
        train(config, workdir, catalog=catalog)


def test_a_catalogue_with_other_word_vectors_is_the_same(finished_run, capsys):
    """OpenBLAS rounds them otherwise on another processor."""
    workdir, config, _ = finished_run
    catalog = open_catalog(config.data)
    other = dataclasses.replace(catalog, word_vectors=catalog.word_vectors * np.float32(1.001))
    train(config, workdir, catalog=other)
    assert "finished before" in "".join(capsys.readouterr())


def test_an_evaluation_reads_titles_in_the_words_of_the_run(tmp_path, finished_run):
    workdir, config, results = finished_run
    shutil.copytree(workdir, tmp_path / "run")
    catalog, run = with_other_words(open_catalog(config.data)), read_run(tmp_path / "run")
    device_mesh = mesh_of_config(config)
    with jax.set_mesh(device_mesh):
        again = evaluate_locked_run(run, catalog, device_mesh)
    assert again["attention"] == results["attention"]
    assert again["accuracy"] == results["accuracy"]


def test_a_workdir_in_use_is_refused(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(ConfigError, match="another process is training there"),
    ):
        train(tiny_run_config(), tmp_path)


def test_the_message_names_the_version_of_a_catalogue_with_the_same_data(tmp_path):
    for version in ("1.0.0", "1.0.1"):
        (tmp_path / "shop" / version).mkdir(parents=True)
        description = {"format_version": tables.FORMAT_VERSION, "data_hash": f"hash of {version}"}
        (tmp_path / "shop" / version / tables.CATALOG_FILE).write_text(json.dumps(description))
    data = config_lib.DataConfig(source="imported", path=str(tmp_path))
    assert version_hint(data, "hash of 1.0.0") == f", which {tmp_path / 'shop' / '1.0.0'} holds"
    assert (
        version_hint(data, "another hash")
        == version_hint(tiny_run_config().data, "hash of 1.0.0")
        == ""
    )


def test_the_commit_is_that_of_the_checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert code_commit().removesuffix("+") == head.strip()


def test_a_run_folder_holds_class_table_and_tokenizer(finished_run):
    """Exports and warm starts need no catalogue."""
    workdir, config, _ = finished_run
    run, catalog = read_run(workdir), open_catalog(config.data)
    assert list(run.class_table().sku) == list(catalog.classes.sku)
    assert list(run.tokenizer().vocabulary) == list(catalog.tokenizer.vocabulary)
