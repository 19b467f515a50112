"""Trains on the Grocery Store Dataset (Klasson et al., WACV 2019): shop photos of 81 products.

The training photos are cut to an exponential tail.

Import:
  sicot import --dataset grocery_store --from DIR --tail-cut 50 --out runs/catalogs/grocery_tail

Command:
  ./run.sh --config=configs/grocery.py --workdir=runs/grocery/co_training

Hardware:
  Two CPU cores.

Result:
  Not measured.
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
        data=DataConfig(
            source="imported", path="runs/catalogs/grocery_tail", head_boundary=20, max_tokens=32
        ),
        preprocessing=Preprocessing(height=112, width=112, resize_height=128, resize_width=128),
        augment=AugmentConfig(min_area=0.35),
        model=ModelConfig(depth=18, width=32),
        optim=OptimConfig(learning_rate=0.05, schedule="cosine", warmup_epochs=2.0),
        train=TrainConfig(batch_size=64, epochs=60, evaluate_every_epochs=5),
        eval=EvalConfig(batch_size=64),
    )
