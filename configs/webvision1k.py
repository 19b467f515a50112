"""WebVision 2.0, 1,000 of its 5,000 classes: web photos with titles of the web, the paper's
schedule.

Import:   sicot import --dataset webvision1k --from DIR --out runs/catalogs/webvision1k      (DIR:
  see data/webvision1k)
Command:  ./run.sh --config=configs/webvision1k.py --workdir=runs/webvision1k/co_training
Both:     sicot compare --config=configs/webvision1k.py --workdir=runs/webvision1k
Hardware: an accelerator; `sicot plan --config=webvision1k` counts its memory.
Result:   not measured.

Momentum, weight decay, augmentation, the number of epochs and the choice of classes are ours.
"""

from sicot_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from sicot_jax.config.preprocessing import Preprocessing


def get_config() -> Config:
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
