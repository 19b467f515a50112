"""The two configs of a comparison with and without text."""

import dataclasses

import pytest

from sicot_jax import config as config_lib
from sicot_jax.config import FREE_ON_RESUME
from sicot_jax.experiments.compare import compared_configs


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
