"""Your own catalogue, with the use of titles that gained over seeds in docs/results.md: no semantic
stream, words alone.

Import:   sicot import products.csv --out catalog          (columns image, sku, title; or a folder
  per SKU)
Command:  sicot compare --config=recommended --config.data.path=catalog --workdir=runs/mine
Hardware: as configs/base.py, less the semantic stream; classifier rows are longer by
  `model.title_words` numbers in training.
Result:   docs/results.md, on other networks.
"""

import dataclasses

from sicot_jax.config import Config, LossConfig, bundled_configs, load


def get_config() -> Config:
    base = load(str(bundled_configs() / "base.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, word_rows=True),
        loss=LossConfig(mixed=0.0, title_words=1.0),
    )
