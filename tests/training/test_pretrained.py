"""Training that starts from a run: streams, class weights, vocabulary, codes."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.finished_runs import last_state, tiny_run_config

from sicot_jax import config as config_lib
from sicot_jax.catalog.open import open_catalog
from sicot_jax.config import Config
from sicot_jax.models.semantic_stream import set_word_vectors
from sicot_jax.parallel import mesh
from sicot_jax.training.checkpoint import CheckpointError
from sicot_jax.training.loop import train
from sicot_jax.training.model import DataShape
from sicot_jax.training.restore import restore_params
from sicot_jax.training.run import mesh_of_config, read_run
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import class_log_prior, initial_state
from sicot_jax.training.warm_start import warm_start


@pytest.mark.slow
def test_init_from_takes_streams_and_classifier(finished_run, tmp_path):
    workdir, config, _ = finished_run
    model = dataclasses.replace(config.model, init_from=str(workdir))
    frozen = dataclasses.replace(config.optim, trainable="classifier/bias")
    warm = dataclasses.replace(config, model=model, optim=frozen)
    train(
        dataclasses.replace(warm, train=dataclasses.replace(warm.train, steps=1)), tmp_path / "warm"
    )
    run = read_run(workdir)
    device_mesh = mesh_of_config(config)
    with jax.set_mesh(device_mesh):
        best = restore_params(run, device_mesh)
    started = last_state(tmp_path / "warm", warm)
    for a, b in zip(jax.tree.leaves(started.params), jax.tree.leaves(best.params), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(started.classifier.weights.kernel, best.classifier.weights.kernel)
    # No stream trains, so batch statistics stand still too.
    for a, b in zip(
        jax.tree.leaves(started.batch_stats), jax.tree.leaves(best.batch_stats), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", [8, 7])
def test_init_from_takes_no_word_vectors_of_another_vocabulary(finished_run, capsys, seed):
    """As many words as the run's in one case, fewer in the other."""
    workdir, config, _ = finished_run
    state, started, source = started_from(workdir, with_seed(config, seed))
    same_count = (
        state.params["semantic"]["word_vectors"].shape
        == source.params["semantic"]["word_vectors"].shape
    )
    assert same_count == (seed == 8)
    np.testing.assert_array_equal(
        started.params["semantic"].pop("word_vectors"), state.params["semantic"]["word_vectors"]
    )
    source.params["semantic"].pop("word_vectors")
    for a, b in zip(jax.tree.leaves(started.params), jax.tree.leaves(source.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "another vocabulary; word vectors are those of the catalogue" in capsys.readouterr().err


@pytest.mark.slow
def test_init_from_keeps_the_word_shares_of_the_catalogue(tmp_path):
    """Neither the tag head of another vocabulary nor the word shares of other titles are taken."""
    flags = ["model.shared_word_weights=True", "loss.mixed=0", "loss.tag_prediction=1"]
    config = config_lib.override_config(tiny_run_config(steps=2), flags)
    train(config, tmp_path / "run")
    state, started, source = started_from(tmp_path / "run", config)
    num_visual_columns = (
        started.classifier.weights.kernel.shape[1]
        - started.params["visual"]["tag_head"]["kernel"].shape[1]
    )
    there, kernel, here = (
        np.asarray(s.classifier.weights.kernel) for s in (source, started, state)
    )
    np.testing.assert_array_equal(kernel[:, :num_visual_columns], there[:, :num_visual_columns])
    np.testing.assert_array_equal(kernel[:, num_visual_columns:], here[:, num_visual_columns:])
    assert (here != there).all(1).any()
    scores = [s.params["visual"]["tag_head"]["kernel"] for s in (started, source)]
    np.testing.assert_array_equal(*scores)
    state, started, source = started_from(tmp_path / "run", with_seed(config, 8))
    scores = [s.params["visual"]["tag_head"]["kernel"] for s in (started, state)]
    np.testing.assert_array_equal(*scores)
    for a, b in zip(
        *(jax.tree.leaves(s.params["visual"]["resnet"]) for s in (started, source)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    # A run without tag head takes folded rows.
    _, started, source = started_from(
        tmp_path / "run",
        config_lib.override_config(
            config, ["loss.tag_prediction=0", "model.shared_word_weights=False"]
        ),
    )
    scores = np.asarray(source.params["visual"]["tag_head"]["kernel"])
    there = np.asarray(source.classifier.weights.kernel)
    np.testing.assert_allclose(
        started.classifier.weights.kernel,
        there[:, :num_visual_columns] + there[:, num_visual_columns:] @ scores.T,
        rtol=1e-4,
        atol=1e-5,
    )
    assert "tag_head" not in started.params["visual"]


def test_init_from_a_run_without_tag_head_keeps_the_initial_tag_head(finished_run):
    workdir, config, _ = finished_run
    flags = ["model.shared_word_weights=True", "loss.mixed=0", "loss.tag_prediction=1"]
    state, started, source = started_from(workdir, config_lib.override_config(config, flags))
    np.testing.assert_array_equal(
        *(s.params["visual"]["tag_head"]["kernel"] for s in (started, state))
    )
    num_visual_columns = source.classifier.weights.kernel.shape[1]
    np.testing.assert_array_equal(
        started.classifier.weights.kernel[:, :num_visual_columns], source.classifier.weights.kernel
    )
    np.testing.assert_array_equal(
        started.classifier.weights.kernel[:, num_visual_columns:],
        state.classifier.weights.kernel[:, num_visual_columns:],
    )


@pytest.mark.slow
def test_init_from_takes_codes_of_as_many_bits(finished_run, tmp_path):
    """Otherwise they start from random weights; a run without codes leaves them out."""
    plain = config_lib.override_config(tiny_run_config(steps=1), ["loss.mixed=0"])
    config = config_lib.override_config(plain, ["loss.codes=1", "model.code_bits=16"])
    train(config, tmp_path / "run")

    def kernels(workdir, config):
        states = started_from(workdir, config)
        return [s.params["visual"].get("code_head", {}).get("kernel") for s in states]

    here, started, there = kernels(tmp_path / "run", config)
    np.testing.assert_array_equal(started, there)
    assert (here != there).any()
    here, started, _ = kernels(
        tmp_path / "run", config_lib.override_config(config, ["model.code_bits=24"])
    )
    np.testing.assert_array_equal(started, here)
    here, started, there = kernels(finished_run[0], config)
    np.testing.assert_array_equal(started, here)
    assert there is None
    _, started, there = kernels(tmp_path / "run", plain)
    assert started is None
    assert there is not None


def test_init_from_another_depth_is_one_line(finished_run):
    workdir, config, _ = finished_run
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=34))
    with pytest.raises(
        CheckpointError, match=r"model.init_from=.*: another model: .* missing; and \d+ more"
    ) as error:
        started_from(workdir, deeper)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def with_seed(config: Config, seed: int) -> Config:
    generated = dataclasses.replace(config.data.generated, seed=seed)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, generated=generated))


def started_from(workdir: Path, config: Config):
    """(Fresh state, the same after a warm start from the run, the run's weights)."""
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, init_from=str(workdir))
    )
    catalog = open_catalog(config.data)
    device_mesh = mesh_of_config(config)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, DataShape.of(catalog), device_mesh)
        prior = mesh.shard_class_vector(
            class_log_prior(catalog.classes.counts["train"], device_mesh), device_mesh
        )
        state = initial_state(setup, prior)
        if config.loss.with_semantic:
            state = set_word_vectors(state, catalog.word_vectors)
        source = restore_params(read_run(workdir), device_mesh)
        return state, warm_start(state, setup, catalog), source
