"""Your own catalogue, with the use of titles that gained over seeds in docs/results.md: no semantic
stream, words alone.

Import:   sicot import products.csv --out catalog          (columns image, sku, title; or a folder
  per SKU)
Command:  sicot compare --config=recommended --config.data.path=catalog --workdir=runs/mine
Hardware: as configs/base.py, less the semantic stream; classifier rows are longer by
  `model.tag_vocabulary` numbers in training.
Result:   docs/results.md, on other networks.
"""

import dataclasses

from sicot_jax.config import Config, LossConfig, bundled_configs_dir, load_config


def get_config() -> Config:
    base = load_config(str(bundled_configs_dir() / "base.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, shared_word_weights=True),
        loss=LossConfig(mixed=0.0, tag_prediction=1.0),
    )
