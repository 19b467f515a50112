"""Trains on Fashion Product Images at 40x30 pixels, ResNet-18 at a quarter of its width.

Import:
  sicot import --dataset fashion_products --from DIR --test-share 0.2 --out runs/catalogs/fashion

Command:
  sicot sweep --config=configs/fashion_small.py --workdir=runs/fashion_small --rates 0.5 1 2

Hardware:
  One CPU core, five to seven minutes a run (AMD EPYC; a quarter of an hour on a slower one).

Result:
  docs/results/titles.md.
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
        preprocessing=Preprocessing(height=40, width=30, resize_height=40, resize_width=30),
        # Flips alone: crops cost four points of validation accuracy in runs of this length.
        augment=AugmentConfig(min_area=1.0, max_ratio=1.0),
        model=ModelConfig(depth=18, width=16),
        optim=OptimConfig(
            learning_rate=0.1,
            nesterov=True,
            weight_decay=5e-4,
            schedule="cosine",
            warmup_epochs=1.0,
        ),
        train=TrainConfig(
            batch_size=64, epochs=40, evaluate_every_epochs=2, checkpoint_every_seconds=300
        ),
        eval=EvalConfig(batch_size=128),
    )
