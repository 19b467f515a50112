"""Trains the paper's largest experiment in shape: 998,131 classes, ResNet-50, D = 2048.

Command:
  python -m sicot_jax.main --config=configs/1m.py

Hardware:
  The classifier's kernel and momentum take 15.2 GiB together, divided over the devices;
  `sicot plan --config=1m --devices=N` estimates the total. Where it does not fit, the command
  prints that plan with overrides that fit, and ends. Compiled for an 8-device mesh in
  tests/classifier/test_scale.py.

Result:
  Not measured at this size; docs/results/training.md has D = 128 on two CPU cores. The paper's 55.8
  M
  photos are private: the catalogue here is generated, with their counts.

The schedule is that of section 4.3. Batch 256 is global (the paper does not say whether it is per
GPU). Momentum, weight decay and augmentation are ours.
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
                num_classes=998_131,
                train_photos=55_776_960,
                validation_per_class=1,
                test_per_class=8,
                image_size=224,
                word_vectors="random",
                word_vector_width=128,
            ),
            head_boundary=200,
            workers=8,
        ),
        preprocessing=Preprocessing(height=224, width=224, resize_height=224, resize_width=224),
        augment=AugmentConfig(flip=False),
        model=ModelConfig(depth=50, width=64),
        optim=OptimConfig(learning_rate=0.1, schedule="step", gamma=0.8, decay_epochs=1.0),
        train=TrainConfig(batch_size=256, epochs=10, compute_dtype="bfloat16"),
        eval=EvalConfig(batch_size=256, max_photos=100_000),
    )
