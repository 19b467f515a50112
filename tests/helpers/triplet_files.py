"""A small catalogue with a file of triplets and query photos, for tests."""

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from sicot_jax.catalog.sources.generated import open_generated
from sicot_jax.config import Config, DataConfig, GeneratedSpec, TrainConfig
from sicot_jax.config.preprocessing import Preprocessing

SPEC = GeneratedSpec(
    num_classes=5, train_photos=40, image_size=12, word_vectors="random", word_vector_width=8
)
SMALL = Preprocessing(height=8, width=8, resize_height=10, resize_width=10)
CATALOG = open_generated(SPEC)
TRAIN = CATALOG.splits["train"]
SKU = list(CATALOG.classes.sku)


def write_triplets(folder, rows, photos=("q0", "q1", "q2")):
    """Writes a file of triplets and the query photos, photo i of grey 80 * i.

    Args:
      folder: where to.
      rows: (request_id, query_image_id, clicked class or SKU, not clicked, weight).
      photos: names of the query photos.
    """
    texts = [[SKU[c] if isinstance(c, int) else c for c in row[:4]] for row in rows]
    columns = dict(
        zip(
            ("request_id", "query_image_id", "clicked", "not_clicked"),
            zip(*texts, strict=True),
            strict=True,
        )
    )
    weight = pa.array([row[4] for row in rows], pa.float32())
    parquet.write_table(pa.table(columns | {"weight": weight}), folder / "t.parquet")
    (folder / "queries").mkdir(exist_ok=True)
    for i, name in enumerate(photos):
        Image.new("RGB", (12, 12), (80 * i,) * 3).save(folder / "queries" / f"{name}.png")


def triplet_config(folder, *, batch=12, parts=1, seed=0, share=0.5, **train_options):
    data = DataConfig(
        generated=SPEC,
        max_tokens=5,
        triplets=str(folder / "t.parquet"),
        queries=str(folder / "queries"),
        triplet_share=share,
    )
    return Config(
        seed=seed,
        data=data,
        preprocessing=SMALL,
        train=TrainConfig(batch_size=batch, micro_batches=parts, **train_options),
    )


ROWS = [("r0", "q0", 0, 1, 1.0), ("r1", "q1", 2, 3, 3.0), ("r2", "q0", 3, 0, 4.0)]


def triplets_and_others(loader, step, parts, count):
    """Returns record indices of a batch: triplets [parts, count, 3] and others [parts, rest]."""
    rows = loader.sampler(step).reshape(-1, parts).T
    return rows[:, : 3 * count].reshape(parts, count, 3), rows[:, 3 * count :]
