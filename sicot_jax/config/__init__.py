"""The config of a run: its sections, preprocessing and batch plan, and how configs are loaded."""

from sicot_jax.config.checks import ConfigError
from sicot_jax.config.data import AugmentConfig, DataConfig, GeneratedSpec
from sicot_jax.config.load import (
    bundled_configs_dir,
    config_from_dict,
    load_config,
    override_config,
    read_flat_config,
)
from sicot_jax.config.model import TEXT_ENCODERS, HeadConfig, LossConfig, ModelConfig, TextConfig
from sicot_jax.config.optimization import EvalConfig, MeshConfig, OptimConfig, TrainConfig
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.config.schema import (
    CONFIG_FORMAT,
    FREE_ON_RESUME,
    Config,
    config_to_dict,
    flatten_config,
)

__all__ = [
    "CONFIG_FORMAT",
    "FREE_ON_RESUME",
    "TEXT_ENCODERS",
    "AugmentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GeneratedSpec",
    "HeadConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Preprocessing",
    "TextConfig",
    "TrainConfig",
    "bundled_configs_dir",
    "config_from_dict",
    "config_to_dict",
    "flatten_config",
    "load_config",
    "override_config",
    "read_flat_config",
]
