"""Trains on the Grocery Store Dataset at 48x48 pixels, ResNet-18 at a quarter of its width.

The training photos are cut to an exponential tail.

Import:
  sicot import --dataset grocery_store --from DIR --tail-cut 50 --out runs/catalogs/grocery_tail

Command:
  sicot sweep --config=configs/grocery_small.py --workdir=runs/grocery_small --rates 0.5 1 2

Hardware:
  One CPU core; time not measured.

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
        data=DataConfig(
            source="imported", path="runs/catalogs/grocery_tail", head_boundary=20, max_tokens=32
        ),
        preprocessing=Preprocessing(height=48, width=48, resize_height=56, resize_width=56),
        augment=AugmentConfig(min_area=0.35),
        model=ModelConfig(depth=18, width=16),
        optim=OptimConfig(
            learning_rate=0.05,
            nesterov=True,
            weight_decay=5e-4,
            schedule="cosine",
            warmup_epochs=2.0,
        ),
        train=TrainConfig(
            batch_size=32, epochs=100, evaluate_every_epochs=5, checkpoint_every_seconds=300
        ),
        eval=EvalConfig(batch_size=128),
    )
