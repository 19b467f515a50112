"""Trains on 1,000 of the 5,000 classes of WebVision 2.0: web photos with web titles.

Import:
  sicot import --dataset webvision1k --from DIR --out runs/catalogs/webvision1k
  (DIR: see data/webvision1k)

Command:
  ./run.sh --config=configs/webvision1k.py --workdir=runs/webvision1k/co_training
  sicot compare --config=configs/webvision1k.py --workdir=runs/webvision1k      (with and without
  text)

Hardware:
  An accelerator; `sicot plan --config=webvision1k` estimates its memory.

Result:
  Not measured.

The schedule is the paper's. Momentum, weight decay, augmentation, the number of epochs and the
choice of classes are ours.
"""

from sicot_jax.config import (
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
            source="imported", path="runs/catalogs/webvision1k", head_boundary=5000, workers=8
        ),
        preprocessing=Preprocessing(height=224, width=224, resize_height=256, resize_width=256),
        model=ModelConfig(depth=50),
        optim=OptimConfig(learning_rate=0.1, schedule="step", gamma=0.8, decay_epochs=1.0),
        train=TrainConfig(batch_size=256, epochs=10, compute_dtype="bfloat16"),
        eval=EvalConfig(batch_size=256),
    )
