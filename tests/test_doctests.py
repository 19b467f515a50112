"""The examples in the docstrings of the public API run and print what they say."""

import doctest
import importlib
import tempfile

import pytest

# Module -> functions and methods that have an example.
EXAMPLES = {
    "sicot_jax": {"load"},
    "sicot_jax.recognizer": {"Recognizer.recognize", "Recognizer.embed"},
    "sicot_jax.catalog.open": {"open_catalog"},
    "sicot_jax.config.load": {"load_config"},
    "sicot_jax.classifier.losses": {"cross_entropy", "co_training_loss"},
    "sicot_jax.training.auxiliary_losses": {"tag_prediction_loss", "triplet_loss"},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what an example writes is removed
    module = importlib.import_module(name)
    examples = {
        test.name.removeprefix(f"{name}.")
        for test in doctest.DocTestFinder(exclude_empty=True).find(module)
        if test.examples
    }
    assert examples == EXAMPLES[name]
    result = doctest.testmod(module)
    assert result.failed == 0, capsys.readouterr().out
