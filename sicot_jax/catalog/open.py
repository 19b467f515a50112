"""One place that knows the kinds of catalogue."""

from __future__ import annotations

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.config import ConfigError, DataConfig


def open_catalog(config: DataConfig) -> Catalog:
    """The catalogue that `data.source` and `data.path` name."""
    match config.source:
        case "imported":
            from sicot_jax.catalog.sources.imported import open_imported

            return open_imported(config.path)
        case "arrays":
            from sicot_jax.catalog.sources.arrays import open_arrays

            return open_arrays(config.path)
        case "generated":
            from sicot_jax.catalog.sources.generated import open_generated

            return open_generated(config.generated)
        case other:
            raise ConfigError(f"data.source={other!r}, wanted generated, imported or arrays")
