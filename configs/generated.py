"""Compares baseline and co-training on a small generated catalogue: what `./run.sh` runs.

Command:
  ./run.sh

Hardware:
  Two CPU cores, under two minutes a variant.

Result:
  Printed at its end; small and quick, so not worth quoting.
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
                num_classes=60,
                train_photos=2400,
                image_size=32,
                test_per_class=20,
                validation_per_class=5,
            )
        ),
        preprocessing=Preprocessing(height=32, width=32, resize_height=32, resize_width=32),
        augment=AugmentConfig(min_area=0.6, flip=False),  # where the mark sits tells products apart
        model=ModelConfig(depth=18, width=16, stem="half", last_stride=1, embedding_width=128),
        optim=OptimConfig(learning_rate=0.1, schedule="cosine", warmup_epochs=0.5),
        train=TrainConfig(batch_size=64, epochs=16, evaluate_every_epochs=4, log_every_steps=50),
        eval=EvalConfig(batch_size=128),
    )
