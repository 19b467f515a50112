"""Class-title prototypes: by hand, and in a step on every mesh."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax import config as config_lib
from sicot_jax import mesh, pipeline
from sicot_jax.catalog.opening import open_catalog
from sicot_jax.config import ConfigError
from sicot_jax.prototypes import centred_directions, class_titles, start_prototypes
from sicot_jax.step import DataShape, class_log_prior, make_setup, make_train_step, new_net, start_state


def tiny(*flags):
    return config_lib.load("tiny", ["--config.model.title_prototypes=tied", *flags])


def test_directions_by_hand():
    """Means (1, 0), (3, 0) and (2, 3), a class without titles between them; their mean is (2, 1)."""
    total = np.array([[2.0, 0.0], [0.0, 0.0], [3.0, 0.0], [4.0, 6.0]])
    got = centred_directions(total, np.array([2, 0, 1, 2]))
    wanted = [[-1 / 2**0.5, -1 / 2**0.5], [0, 0], [1 / 2**0.5, -1 / 2**0.5], [0, 1]]
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert not centred_directions(np.zeros((2, 3)), np.zeros(2, int)).any()


def test_titles_are_read_as_training_reads_them():
    """Words of SKU and category masked where the config masks them; every word there, whatever is dropped in training."""
    config = tiny()
    catalog = open_catalog(config.data)
    raw = class_titles(catalog, config)
    assert raw.shape == (11, catalog.word_vectors.shape[1])
    np.testing.assert_allclose(np.linalg.norm(raw, axis=1), 1, rtol=1e-5)
    dropping = config_lib.override(config, ["data.word_dropout=0.9", "data.title_dropout=0.9"])
    np.testing.assert_array_equal(class_titles(catalog, dropping), raw)
    masked = class_titles(catalog, config_lib.override(config, ["data.title=masked"]))
    assert np.abs(masked - raw).max() > 0.1


def test_what_the_classifier_meets_folds_into_a_plain_one():
    """[w, t] . [v, A v] = (w + A t) . v: a model with prototypes is a plain one at test time."""
    config, rng = tiny(), np.random.default_rng(0)
    net = new_net(config, DataShape(11, 5, 8, 100))
    stream = net.visual
    v = jnp.asarray(rng.normal(size=(3, stream.features_width)), jnp.float32)
    w, t = (jnp.asarray(rng.normal(size=(11, n)), jnp.float32) for n in (stream.features_width, 8))
    joined = stream.extend(v) @ jnp.concatenate([w, t], 1).T
    np.testing.assert_allclose(joined, v @ (w + t @ stream.to_words.kernel[...].T).T, rtol=1e-4, atol=1e-5)
    assert stream.embedding_width == stream.features_width + 8


@pytest.mark.parametrize(
    "device_mesh", [(4, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(1, 1), (1, 8)])], indirect=True
)
@pytest.mark.parametrize("kind", ["tied", "start"])
def test_tied_prototypes_stay_and_others_move(device_mesh, kind):
    config = tiny(f"--config.model.title_prototypes={kind}", "--config.optim.warmup_epochs=0")
    catalog = open_catalog(config.data)
    shape = DataShape.of(catalog)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, shape, device_mesh)
        prior = mesh.class_vector(class_log_prior(catalog.classes.counts["train"], device_mesh), device_mesh)
        prototypes = class_titles(catalog, config)
        state = start_prototypes(start_state(setup, prior), prototypes)
        own = state.classifier.kernel.shape[1] - shape.word_width
        before = np.asarray(state.classifier.kernel)
        np.testing.assert_array_equal(before[:11, own:], prototypes)
        assert not before[11:].any() and state.classifier.kernel.sharding.is_equivalent_to(
            start_state(setup, prior).classifier.kernel.sharding, 2
        )
        batch = pipeline.to_device(pipeline.train_batches(catalog, config)(0), device_mesh)
        state, losses = jax.jit(make_train_step(setup))(state, batch)
        after = np.asarray(state.classifier.kernel)
    assert np.isfinite(losses["total"]) and not after[11:].any()
    assert (after[:11, :own] != before[:11, :own]).any()
    assert (after[:, own:] == before[:, own:]).all() == (kind == "tied")


def test_what_cannot_be_is_refused(one_device):
    with pytest.raises(
        ConfigError, match="head.kind='sampled'.*set head.kind=class_sharded or model.title_prototypes=start"
    ):
        tiny("--config.head.kind=sampled")
    with pytest.raises(ConfigError, match="optim.name='lars'.*set optim.name=sgd or model.title_prototypes=start"):
        tiny("--config.optim.name=lars")
    with pytest.raises(ConfigError, match="data.title='none': there is no title to make them of"):
        tiny("--config.data.title=none", "--config.loss.mixed=0")
    untitled, device = DataShape(11, 1, 8, 100), SimpleNamespace(size=1)
    remedy = r"\(sicot import --titles-from RUN\)"
    with pytest.raises(ConfigError, match=f"no titles, and loss.mixed or .* wants them; .* {remedy} or set both to 0"):
        make_setup(tiny(), untitled, device)
    with pytest.raises(
        ConfigError, match=f"no titles, and model.title_prototypes='tied' wants them; set it to no, .*{remedy}"
    ):
        config = dataclasses.replace(tiny(), loss=config_lib.LossConfig(mixed=0.0))
        make_setup(config, untitled, device)
