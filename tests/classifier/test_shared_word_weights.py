"""Shared word weights: word shares by hand, folding, and a step on every mesh."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax import config as config_lib
from sicot_jax.catalog.batches import train_batch_loader
from sicot_jax.catalog.open import open_catalog
from sicot_jax.classifier.class_weights import (
    class_word_shares,
    fold_shared_word_weights,
    set_word_columns,
)
from sicot_jax.config import ConfigError
from sicot_jax.parallel import mesh
from sicot_jax.training import device_batches
from sicot_jax.training.model import DataShape, build_model, num_tags
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import class_log_prior, initial_state
from sicot_jax.training.step import make_train_step


def tiny(*flags):
    return config_lib.load_config("tiny", ["--config.model.shared_word_weights=True", *flags])


class TitleSplit:
    """Training records with these titles (word ids) and labels."""

    def __init__(self, titles, labels):
        self.titles, self.labels = titles, np.asarray(labels)

    def __len__(self):
        return len(self.titles)

    def __getitem__(self, index):
        return {"token_ids": np.asarray(self.titles[index], np.int32)}


def test_word_shares_by_hand():
    """Two of four words are tags; the others count in a title's length alone. A title without a
    word does not count.
    """
    split = TitleSplit([[1, 1, 4, 2], [3], [], [2], [4]], [0, 0, 0, 2, 3])
    catalog = SimpleNamespace(splits={"train": split}, classes=range(5), tokenizer=None)
    shares = class_word_shares(catalog, tiny(), 2)
    np.testing.assert_allclose(shares, [[0.25, 0.125], [0, 0], [0, 1], [0, 0], [0, 0]])
    assert shares.dtype == np.float32


def test_titles_are_read_in_the_variant_of_training():
    """Words of SKU and category masked where the config masks them."""
    config = tiny()
    catalog = open_catalog(config.data)
    count = num_tags(config, DataShape.of(catalog))
    assert count == len(catalog.tokenizer.vocabulary) - 1
    raw = class_word_shares(catalog, config, count)
    np.testing.assert_allclose(raw.sum(1), 1, rtol=1e-5)
    masked = class_word_shares(
        catalog, config_lib.override_config(config, ["data.title=masked"]), count
    )
    assert (
        np.abs(masked - raw).max() > 0.05
    )  # words of the class are missing, the others weigh more


def test_classifier_input_folds_into_plain_weights():
    """[w, t] . [v, A v] = (w + A t) . v."""
    config, rng = tiny("--config.model.tag_vocabulary=4"), np.random.default_rng(0)
    model = build_model(config, DataShape(11, 9, 8, 100))
    stream = model.visual
    v = jnp.asarray(rng.normal(size=(3, stream.embedding_width)), jnp.float32)
    w, t = (jnp.asarray(rng.normal(size=(11, n)), jnp.float32) for n in (stream.embedding_width, 4))
    logits = stream.classifier_input(v) @ jnp.concatenate([w, t], 1).T
    np.testing.assert_allclose(
        logits, v @ (w + t @ stream.tag_head.kernel[...].T).T, rtol=1e-4, atol=1e-5
    )
    assert stream.classifier_width == stream.embedding_width + 4


@pytest.mark.parametrize("device_mesh", [(4, 2)], indirect=True)
def test_plain_class_weights_have_the_same_logits(device_mesh):
    """Rows w + A^T t for v alone; weights without shared words stay as they are."""
    config = tiny("--config.loss.mixed=0")
    catalog = open_catalog(config.data)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, DataShape.of(catalog), device_mesh)
        prior = mesh.shard_class_vector(
            class_log_prior(catalog.classes.counts["train"], device_mesh), device_mesh
        )
        state = initial_state(setup, prior)
        shared = state.classifier.weights
        tag_kernel = state.params["visual"]["tag_head"]["kernel"]
        plain = fold_shared_word_weights(shared, tag_kernel)
        assert plain.kernel.sharding.is_equivalent_to(shared.kernel.sharding, 2)
        v = np.random.default_rng(0).normal(size=(3, plain.width)).astype(np.float32)
        wanted = np.concatenate([v, v @ np.asarray(tag_kernel)], 1) @ np.asarray(shared.kernel).T
        np.testing.assert_allclose(v @ np.asarray(plain.kernel).T, wanted, rtol=1e-4, atol=1e-5)
        assert fold_shared_word_weights(plain, tag_kernel) is plain
        assert fold_shared_word_weights(plain, None) is plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "device_mesh",
    [(4, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(1, 1), (1, 8)])],
    indirect=True,
)
def test_word_columns_are_frozen_and_the_tag_head_trains(device_mesh):
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
        shares = class_word_shares(catalog, config, 5)
        state = initial_state(setup, prior)
        initial = state.classifier.weights
        weights = set_word_columns(initial, shares)
        classifier = dataclasses.replace(state.classifier, weights=weights)
        state = dataclasses.replace(state, classifier=classifier)
        visual = weights.width - 5  # columns
        before = np.asarray(weights.kernel)
        tag_kernel = np.asarray(state.params["visual"]["tag_head"]["kernel"])
        np.testing.assert_array_equal(before[:11, visual:], shares)
        assert not before[11:].any()
        assert weights.kernel.sharding.is_equivalent_to(initial.kernel.sharding, 2)
        assert "semantic" not in state.params
        batch = device_batches.to_device(train_batch_loader(catalog, config)(0), device_mesh)
        assert "token_ids" not in batch  # no loss reads them
        state, losses = jax.jit(make_train_step(setup))(state, batch)
        after = np.asarray(state.classifier.weights.kernel)
    assert np.isfinite(losses["total"])
    assert not after[11:].any()
    assert (after[:11, :visual] != before[:11, :visual]).any()
    assert (np.asarray(state.params["visual"]["tag_head"]["kernel"]) != tag_kernel).any()
    np.testing.assert_array_equal(after[:, visual:], before[:, visual:])


def test_contradictory_configs_are_refused(one_device):
    suggestion = "set head.kind=class_sharded or model.shared_word_weights=False"
    with pytest.raises(ConfigError, match=rf"head.kind='sampled'.*{suggestion}"):
        tiny("--config.head.kind=sampled")
    with pytest.raises(
        ConfigError,
        match=r"optim.name='lars'.*set optim.name=sgd or model.shared_word_weights=False",
    ):
        tiny("--config.optim.name=lars")
    with pytest.raises(ConfigError, match=r"data.title='none': there are no titles to take"):
        tiny("--config.data.title=none", "--config.loss.mixed=0")
    with pytest.raises(ConfigError, match=r"model.tag_vocabulary=0, wanted 1 or more"):
        tiny("--config.model.tag_vocabulary=0")
    no_titles, device = DataShape(11, 1, 8, 100), SimpleNamespace(size=1)
    suggestion = r"\(sicot import --titles-from RUN\)"
    with pytest.raises(
        ConfigError,
        match=rf"no titles, and loss.mixed or .* needs them; .* {suggestion} or set both to 0",
    ):
        make_setup(tiny(), no_titles, device)
    config = dataclasses.replace(tiny(), loss=config_lib.LossConfig(mixed=0.0))
    with pytest.raises(
        ConfigError,
        match=(
            "no titles, and model.shared_word_weights=True needs them; set it to "
            rf".*{suggestion}"
        ),
    ):
        make_setup(config, no_titles, device)
