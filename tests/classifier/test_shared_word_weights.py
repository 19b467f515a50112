"""Rows that share the words of titles: by hand, and in a step on every mesh."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax import config as config_lib
from sicot_jax.catalog.batches import train_batch_loader
from sicot_jax.catalog.open import open_catalog
from sicot_jax.classifier.shared_word_weights import class_words, start_word_rows
from sicot_jax.config import ConfigError
from sicot_jax.parallel import mesh
from sicot_jax.training import device_batches
from sicot_jax.training.evaluate import plain_classifier
from sicot_jax.training.step import make_train_step
from sicot_jax.training.state import class_log_prior, initial_state
from sicot_jax.training.setup import make_setup
from sicot_jax.training.model import DataShape, build_model, num_tags


def tiny(*flags):
    return config_lib.load_config("tiny", ["--config.model.shared_word_weights=True", *flags])


class Titled:
    """Training records with these titles (word ids) and labels."""

    def __init__(self, titles, labels):
        self.titles, self.labels = titles, np.asarray(labels)

    def __len__(self):
        return len(self.titles)

    def __getitem__(self, index):
        return {"token_ids": np.asarray(self.titles[index], np.int32)}


def test_words_of_classes_by_hand():
    """Of four words two have a score; the others count in the length alone. A title without a word
    does not count.
    """
    split = Titled([[1, 1, 4, 2], [3], [], [2], [4]], [0, 0, 0, 2, 3])
    catalog = SimpleNamespace(splits={"train": split}, classes=range(5), tokenizer=None)
    got = class_words(catalog, tiny(), 2)
    np.testing.assert_allclose(got, [[0.25, 0.125], [0, 0], [0, 1], [0, 0], [0, 0]])
    assert got.dtype == np.float32


def test_titles_are_read_as_training_reads_them():
    """Words of SKU and category masked where the config masks them."""
    config = tiny()
    catalog = open_catalog(config.data)
    told = num_tags(config, DataShape.of(catalog))
    assert told == len(catalog.tokenizer.vocabulary) - 1
    raw = class_words(catalog, config, told)
    np.testing.assert_allclose(raw.sum(1), 1, rtol=1e-5)
    masked = class_words(catalog, config_lib.override_config(config, ["data.title=masked"]), told)
    assert np.abs(masked - raw).max() > 0.05  # whole words of the class gone, the others heavier


def test_what_the_classifier_meets_folds_into_a_plain_one():
    """[w, t] . [v, A v] = (w + A t) . v: a model whose rows share words is a plain one at test
    time.
    """
    config, rng = tiny("--config.model.tag_vocabulary=4"), np.random.default_rng(0)
    net = build_model(config, DataShape(11, 9, 8, 100))
    stream = net.visual
    v = jnp.asarray(rng.normal(size=(3, stream.embedding_width)), jnp.float32)
    w, t = (jnp.asarray(rng.normal(size=(11, n)), jnp.float32) for n in (stream.embedding_width, 4))
    joined = stream.classifier_input(v) @ jnp.concatenate([w, t], 1).T
    np.testing.assert_allclose(
        joined, v @ (w + t @ stream.tag_head.kernel[...].T).T, rtol=1e-4, atol=1e-5
    )
    assert stream.classifier_width == stream.embedding_width + 4


@pytest.mark.parametrize("device_mesh", [(4, 2)], indirect=True)
def test_the_plain_classifier_has_the_same_logits(device_mesh):
    """What is tested, normalised and kept is v and rows w + A^T t; a classifier without shared
    words is itself.
    """
    config = tiny("--config.loss.mixed=0")
    catalog = open_catalog(config.data)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, DataShape.of(catalog), device_mesh)
        prior = mesh.shard_class_vector(
            class_log_prior(catalog.classes.counts["train"], device_mesh), device_mesh
        )
        state = initial_state(setup, prior)
        plain = plain_classifier(state)
        own = plain.kernel.shape[1]
        assert plain.kernel.sharding.is_equivalent_to(state.classifier.kernel.sharding, 2)
        v = np.random.default_rng(0).normal(size=(3, own)).astype(np.float32)
        kernel, scores = (
            np.asarray(x)
            for x in (state.classifier.kernel, state.params["visual"]["tag_head"]["kernel"])
        )
        wanted = np.concatenate([v, v @ scores], 1) @ kernel.T
        np.testing.assert_allclose(v @ np.asarray(plain.kernel).T, wanted, rtol=1e-4, atol=1e-5)
        without = dataclasses.replace(state, classifier=plain)
        assert plain_classifier(without).kernel is plain.kernel


@pytest.mark.parametrize(
    "device_mesh",
    [(4, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(1, 1), (1, 8)])],
    indirect=True,
)
def test_shared_words_stay_and_what_they_share_learns(device_mesh):
    config = tiny(
        "--config.optim.warmup_epochs=0", "--config.loss.mixed=0", "--config.model.tag_vocabulary=5"
    )
    catalog = open_catalog(config.data)
    shape = DataShape.of(catalog)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, shape, device_mesh)
        prior = mesh.shard_class_vector(
            class_log_prior(catalog.classes.counts["train"], device_mesh), device_mesh
        )
        words = class_words(catalog, config, 5)
        state = initial_state(setup, prior)
        state = dataclasses.replace(state, classifier=start_word_rows(state.classifier, words))
        own = state.classifier.kernel.shape[1] - 5
        before, scores = (
            np.asarray(state.classifier.kernel),
            np.asarray(state.params["visual"]["tag_head"]["kernel"]),
        )
        np.testing.assert_array_equal(before[:11, own:], words)
        assert not before[11:].any()
        assert state.classifier.kernel.sharding.is_equivalent_to(
            initial_state(setup, prior).classifier.kernel.sharding, 2
        )
        assert "semantic" not in state.params
        batch = device_batches.to_device(train_batch_loader(catalog, config)(0), device_mesh)
        assert "token_ids" not in batch  # no loss reads them
        state, losses = jax.jit(make_train_step(setup))(state, batch)
        after = np.asarray(state.classifier.kernel)
    assert np.isfinite(losses["total"])
    assert not after[11:].any()
    assert (after[:11, :own] != before[:11, :own]).any()
    assert (np.asarray(state.params["visual"]["tag_head"]["kernel"]) != scores).any()
    np.testing.assert_array_equal(after[:, own:], before[:, own:])


def test_what_cannot_be_is_refused(one_device):
    with pytest.raises(
        ConfigError,
        match="head.kind='sampled'.*set head.kind=class_sharded or model.shared_word_weights=False",
    ):
        tiny("--config.head.kind=sampled")
    with pytest.raises(
        ConfigError,
        match="optim.name='lars'.*set optim.name=sgd or model.shared_word_weights=False",
    ):
        tiny("--config.optim.name=lars")
    with pytest.raises(ConfigError, match="data.title='none': there is no title to take words of"):
        tiny("--config.data.title=none", "--config.loss.mixed=0")
    with pytest.raises(ConfigError, match="model.tag_vocabulary=0, wanted 1 or more"):
        tiny("--config.model.tag_vocabulary=0")
    untitled, device = DataShape(11, 1, 8, 100), SimpleNamespace(size=1)
    remedy = r"\(sicot import --titles-from RUN\)"
    with pytest.raises(
        ConfigError,
        match=f"no titles, and loss.mixed or .* wants them; .* {remedy} or set both to 0",
    ):
        make_setup(tiny(), untitled, device)
    with pytest.raises(
        ConfigError,
        match=f"no titles, and model.shared_word_weights=True wants them; set it to False, .*{remedy}",
    ):
        config = dataclasses.replace(tiny(), loss=config_lib.LossConfig(mixed=0.0))
        make_setup(config, untitled, device)
