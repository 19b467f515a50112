"""Opens a catalogue of any kind: imported, array file or generated."""

from __future__ import annotations

from sicot_jax.catalog.catalog import Catalog
from sicot_jax.config import ConfigError, DataConfig


def open_catalog(config: DataConfig) -> Catalog:
    """Opens the catalogue that `data.source` and `data.path` name.

    Args:
      config: the data section of a config.

    Returns:
      The catalogue; photos are read when a record is.

    Raises:
      ConfigError: an unknown source.
      InputError: there is no such catalogue, or it is damaged.

    Example:
      >>> from sicot_jax.config import GeneratedSpec
      >>> spec = GeneratedSpec(num_classes=3, train_photos=9, word_vectors="random")
      >>> catalog = open_catalog(DataConfig(source="generated", generated=spec))
      >>> len(catalog.classes.sku), len(catalog.splits["train"])
      (3, 9)
    """
    match config.source:
        case "imported":
            from sicot_jax.catalog.sources.imported import open_imported

            return open_imported(config.path)
        case "arrays":
            from sicot_jax.catalog.sources.arrays import open_array_file

            return open_array_file(config.path)
        case "generated":
            from sicot_jax.catalog.sources.generated import open_generated

            return open_generated(config.generated)
        case other:
            raise ConfigError(f"data.source={other!r}, wanted generated, imported or arrays")
