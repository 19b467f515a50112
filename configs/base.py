"""Trains on your own catalogue on one machine, whatever it sells: a starting point.

Import:
  sicot import products.csv --out catalog
  (columns image, sku and optionally title, ...; or a folder with one folder per SKU)

Command:
  sicot compare --config=base --config.data.path=catalog --workdir=runs/mine

Hardware:
  Any; on an accelerator raise preprocessing, model.depth and batch size. Speed not measured.
"""

from sicot_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    Preprocessing,
    TrainConfig,
)


def get_config() -> Config:
    """Returns the config."""
    return Config(
        data=DataConfig(source="imported", path="catalog"),
        preprocessing=Preprocessing(height=112, width=112, resize_height=128, resize_width=128),
        augment=AugmentConfig(min_area=0.35),
        model=ModelConfig(depth=18, width=32),
        optim=OptimConfig(learning_rate=0.05, schedule="cosine", warmup_epochs=1.0),
        train=TrainConfig(batch_size=64, epochs=30),
        eval=EvalConfig(batch_size=64),
    )
