r"""Trains on a generated catalogue of 1,000 products, to vary what its titles contain.

Gains are measured over the informativeness of titles, and over the words that head and tail
classes share.

Command:
  sicot sweep --config=configs/generated_1k.py --config.data.generated.informativeness=0.5 \
    --workdir=runs/generated_1k/informativeness_0.5

Hardware:
  One CPU core.

Result:
  docs/results/titles.md.
"""

from sicot_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EvalConfig,
    GeneratedSpec,
    ModelConfig,
    OptimConfig,
    Preprocessing,
    TrainConfig,
)


def get_config() -> Config:
    """Returns the config."""
    return Config(
        data=DataConfig(
            generated=GeneratedSpec(
                num_classes=1000,
                train_photos=20_000,
                image_size=32,
                test_per_class=5,
                validation_per_class=2,
            )
        ),
        preprocessing=Preprocessing(height=32, width=32, resize_height=32, resize_width=32),
        augment=AugmentConfig(min_area=0.6, flip=False),  # where the mark sits tells products apart
        model=ModelConfig(depth=18, width=16),
        optim=OptimConfig(
            learning_rate=0.1,
            nesterov=True,
            weight_decay=5e-4,
            schedule="cosine",
            warmup_epochs=1.0,
        ),
        train=TrainConfig(
            batch_size=64, epochs=20, evaluate_every_epochs=2, checkpoint_every_seconds=300
        ),
        eval=EvalConfig(batch_size=128),
    )
