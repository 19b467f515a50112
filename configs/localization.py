r"""Learns where the product is, without boxes, on a generated catalogue whose boxes are known.

Photos show a product (5 to 60 % of the area, anywhere), clutter and a second product. First a
network is trained that knows the products, also by a part of them; then the box branch, with the
other weights frozen:

Command (S: 0, 1, 2):
  sicot train --config=configs/localization.py --workdir=runs/boxes/products_S --config.seed=S
  BRANCH="--config=configs/localization.py --config.model.localization=image \
    --config.loss.background_suppression=1 --config.optim.trainable=visual/localization \
    --config.optim.name=adamw --config.optim.learning_rate=0.002 --config.optim.weight_decay=0 \
    --config.augment.enabled=False --config.train.epochs=6"
  sicot train $BRANCH --workdir=runs/boxes/image_S --config.seed=S \
    --config.model.init_from=runs/boxes/products_S
  python -m benchmarks.localization \
    runs/boxes/products_0,runs/boxes/products_1,runs/boxes/products_2 \
    runs/boxes/image_0,runs/boxes/image_1,runs/boxes/image_2

The other rows of the table, each with $BRANCH and in this order:
  known      --config.model.init_from=runs/boxes/products_0 \
    --config.loss.background_suppression=0 --config.loss.box_regression=10 (and 1)
  on_map_S   --config.model.init_from=runs/boxes/image_S --config.seed=S \
    --config.model.localization=features --config.loss.background_suppression=0 \
    --config.optim.trainable=classifier --config.optim.learning_rate=1e-9 --config.train.steps=1
  features   --config.model.init_from=runs/boxes/products_0 --config.model.localization=features
  joint      --config.model.init_from=runs/boxes/image_0 --config.optim.trainable= \
    --config.optim.learning_rate=0.0007 --config.optim.weight_decay=0.0005 \
    --config.augment.enabled=True --config.augment.random_erasing=0.3 --config.loss.triplet=0.5

Hardware:
  One CPU core, 10 and 6 minutes.

Result:
  docs/results/localization.md.
"""

from sicot_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EvalConfig,
    GeneratedSpec,
    LossConfig,
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
                train_photos=6000,
                zipf_exponent=0.0,
                validation_per_class=10,
                test_per_class=20,
                image_size=64,
                box_area=(0.05, 0.6),
                clutter=1.0,
                word_vectors="random",
            )
        ),
        preprocessing=Preprocessing(height=64, width=64, resize_height=64, resize_width=64),
        augment=AugmentConfig(min_area=1.0, max_ratio=1.0, flip=False, random_erasing=0.7),
        model=ModelConfig(depth=18, width=16, stem="half"),
        loss=LossConfig(mixed=0.0),
        optim=OptimConfig(
            learning_rate=0.1,
            nesterov=True,
            weight_decay=5e-4,
            schedule="cosine",
            warmup_epochs=0.5,
        ),
        train=TrainConfig(
            batch_size=64, epochs=14, evaluate_every_epochs=2, checkpoint_every_seconds=120
        ),
        eval=EvalConfig(batch_size=100),
    )
