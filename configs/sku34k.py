"""Trains on the paper's 34,258 SKUs in shape: a generated catalogue with their counts.

Command:
  python -m sicot_jax.main --config=configs/sku34k.py
  sicot compare --config=sku34k --workdir=runs/sku34k      (with and without text)

Hardware:
  An accelerator; `sicot plan --config=sku34k` estimates its memory.

Result:
  Not measured. The paper's photos are private: 2,305,853 to train and 171,290 to test (5 a class)
  of 34,258 SKUs, titles with a vocabulary of 19,762 words, head above 100 photos. Classes, photos
  and boundary are the same here; photos, titles and their vocabulary are the generator's, and
  numbers are not to be compared with the paper's.

The schedule is the paper's. Momentum, weight decay, augmentation, the number of epochs and the
validation photos are ours.
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
                num_classes=34_258,
                train_photos=2_305_853,
                validation_per_class=1,
                test_per_class=5,
                image_size=256,
                word_vector_width=128,
            ),
            head_boundary=100,
            workers=8,
        ),
        preprocessing=Preprocessing(height=224, width=224, resize_height=256, resize_width=256),
        augment=AugmentConfig(flip=False),  # where the mark sits tells products apart
        model=ModelConfig(depth=50),
        optim=OptimConfig(learning_rate=0.1, schedule="step", gamma=0.8, decay_epochs=1.0),
        train=TrainConfig(batch_size=256, epochs=10, compute_dtype="bfloat16"),
        eval=EvalConfig(batch_size=256),
    )
