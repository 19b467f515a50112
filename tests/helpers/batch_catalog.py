"""A hand-made catalogue and small configs for tests of host batches."""

import numpy as np

from sicot_jax.catalog.catalog import Catalog, ClassTable
from sicot_jax.catalog.tokenizer import WordTokenizer
from sicot_jax.config import Config, DataConfig, GeneratedSpec, TrainConfig
from sicot_jax.config.preprocessing import Preprocessing

SPEC = GeneratedSpec(
    num_classes=4, train_photos=23, image_size=12, word_vectors="random", word_vector_width=8
)
SMALL = Preprocessing(height=8, width=8, resize_height=10, resize_width=9)


class HandMadeSplit:
    """Training photo i of class LABELS[i] has the one word i + 1 in its title.

    So a title identifies the record it comes from.
    """

    labels = np.repeat([0, 1, 2, 3], [1, 2, 9, 60])[
        np.random.default_rng(0).permutation(72)
    ].astype(np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"token_ids": np.array([index + 1], np.int32), "class_id": int(self.labels[index])}


class TextlessSplit(HandMadeSplit):
    """Photo i is of grey i; a title read by mistake would show in a batch."""

    def __getitem__(self, index):
        record = {
            "image_id": f"photo {index}",
            "class_id": int(self.labels[index]),
            "title": "text",
            "token_ids": np.ones(3),
        }
        return record | {"image": np.full((10, 9, 3), index, np.uint8)}


def hand_made_catalog(vocabulary=("",)):
    """Returns a catalogue of four classes whose training split is a `HandMadeSplit`."""
    names = ["a", "b", "c", "d"]
    table = ClassTable(
        names, names, names, {"train": np.bincount(HandMadeSplit.labels)}, np.zeros(4, bool)
    )
    word_vectors = np.zeros((len(vocabulary), 2))
    splits = {"train": HandMadeSplit()}
    return Catalog("hand-made", "0", table, 1, WordTokenizer(vocabulary), word_vectors, splits)


def batch_config(*, seed=0, batch=6, **data):
    """Returns a config of small batches with titles of five words at most."""
    return Config(
        seed=seed,
        data=DataConfig(generated=SPEC, **{"max_tokens": 5, **data}),
        preprocessing=SMALL,
        train=TrainConfig(batch_size=batch),
    )
