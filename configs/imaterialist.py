r"""Trains on iMaterialist Product 2019: 2,019 products, web photos without titles.

Import:
  sicot import --dataset imaterialist --from DIR --max-bad-share 0.6 \
    --out runs/catalogs/imaterialist
  (DIR, and why so many photos may be missing: see data/imaterialist)

Command:
  ./run.sh --config=configs/imaterialist.py --workdir=runs/imaterialist/baseline \
    --config.loss.mixed=0
  Co-training needs titles, which the data set lacks: sicot import --titles-from RUN

Hardware:
  An accelerator; `sicot plan --config=imaterialist` estimates its memory.

Result:
  Not measured.

The schedule is the paper's. Momentum, weight decay, augmentation and the number of epochs are ours.
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
            source="imported", path="runs/catalogs/imaterialist", head_boundary=200, workers=8
        ),
        preprocessing=Preprocessing(height=224, width=224, resize_height=256, resize_width=256),
        model=ModelConfig(depth=50),
        optim=OptimConfig(learning_rate=0.1, schedule="step", gamma=0.8, decay_epochs=1.0),
        train=TrainConfig(batch_size=256, epochs=10, compute_dtype="bfloat16"),
        eval=EvalConfig(batch_size=256),
    )
