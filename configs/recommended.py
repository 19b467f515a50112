"""Trains on your own catalogue with the use of titles that gained most in docs/results/titles.md.

No semantic stream: an auxiliary loss predicts the words of the title, and classes share weights
through words.

Import:
  sicot import products.csv --out catalog
  (columns image, sku, title; or a folder with one folder per SKU)

Command:
  sicot compare --config=recommended --config.data.path=catalog --workdir=runs/mine

Hardware:
  As configs/base.py, without the semantic stream; classifier rows are longer by
  `model.tag_vocabulary` numbers in training.

Result:
  docs/results/titles.md, on other networks.
"""

import dataclasses

from sicot_jax.config import Config, LossConfig, bundled_configs_dir, load_config


def get_config() -> Config:
    """Returns the config."""
    base = load_config(str(bundled_configs_dir() / "base.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, shared_word_weights=True),
        loss=LossConfig(mixed=0.0, tag_prediction=1.0),
    )
