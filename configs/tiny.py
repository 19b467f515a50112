"""Trains the smallest run that goes through every part, in seconds on a CPU; used by the tests.

Command:
  ./run.sh --config=configs/tiny.py --workdir=runs/tiny

Hardware:
  Any; two CPU cores are enough.

Result:
  None worth quoting; it is there to be quick.
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
    TextConfig,
    TrainConfig,
)


def get_config() -> Config:
    """Returns the config."""
    return Config(
        data=DataConfig(
            generated=GeneratedSpec(
                num_classes=11,
                train_photos=160,
                validation_per_class=1,
                test_per_class=2,
                image_size=24,
                word_vector_width=16,
                word_vectors="random",
            ),
            max_tokens=8,
        ),
        preprocessing=Preprocessing(height=24, width=24, resize_height=24, resize_width=24),
        augment=AugmentConfig(flip=False),
        model=ModelConfig(
            depth=10,
            width=8,
            stem="small",
            embedding_width=16,
            text=TextConfig(windows=4, hidden=8),
        ),
        optim=OptimConfig(learning_rate=0.05),
        train=TrainConfig(batch_size=32, epochs=2, log_every_steps=2, tensorboard=False),
        eval=EvalConfig(batch_size=16, top_k=5),
    )
