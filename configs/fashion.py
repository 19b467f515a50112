"""Trains on Fashion Product Images (Small): photos of 60x80 pixels with titles.

Classes are brand x article type.

Import:
  sicot import --dataset fashion_products --from DIR --out runs/catalogs/fashion
  (DIR: see data/fashion_products)

Command:
  ./run.sh --config=configs/fashion.py --workdir=runs/fashion/co_training
  sicot compare --config=configs/fashion.py --workdir=runs/fashion      (with and without text)

Hardware:
  Two CPU cores.

Result:
  Not measured with this schedule; docs/results/titles.md has runs at half the photo size and half
  the width.
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
        data=DataConfig(source="imported", path="runs/catalogs/fashion", head_boundary=100),
        preprocessing=Preprocessing(height=80, width=60, resize_height=80, resize_width=60),
        augment=AugmentConfig(min_area=0.5),
        # Half width, and the last map kept at 5x4: two CPU cores do an epoch in minutes.
        model=ModelConfig(depth=18, width=32, last_stride=1),
        optim=OptimConfig(learning_rate=0.1, schedule="step", gamma=0.8, decay_epochs=1.0),
        train=TrainConfig(batch_size=128, epochs=10),
        eval=EvalConfig(batch_size=128),
    )
