"""iMaterialist Product 2019: 2,019 products, web photos without titles, the paper's schedule.

Import:   sicot import --dataset imaterialist --from DIR --max-bad-share 0.6 --out
  runs/catalogs/imaterialist
          (DIR, and why so many photos may be missing: see data/imaterialist)
Command:  ./run.sh --config=configs/imaterialist.py --workdir=runs/imaterialist/baseline
  --config.loss.mixed=0
Both:     wants a catalogue with titles, which the data set has not: sicot import --titles-from RUN
Hardware: an accelerator; `sicot plan --config=imaterialist` counts its memory.
Result:   not measured.

Momentum, weight decay, augmentation and the number of epochs are ours.
"""

from sicot_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from sicot_jax.config.preprocessing import Preprocessing


def get_config() -> Config:
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
