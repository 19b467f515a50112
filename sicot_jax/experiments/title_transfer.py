"""Transfers titles to photos without one, from the nearest photo by a finished run's embeddings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax.catalog.batches import PhotoBatchLoader
from sicot_jax.catalog.catalog import Catalog, Record, Split
from sicot_jax.catalog.importing.settings import TransferredTitle
from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.parallel import distributed, mesh
from sicot_jax.parallel.array_types import Float, Int
from sicot_jax.training.predict import make_embed_step, map_photos
from sicot_jax.training.restore import RestoredModel, restore_params
from sicot_jax.training.run import Run, check_catalog_of_run, fit_run_to_devices, read_run

# One step of the search: 128 MiB of similarities over all devices, whatever the catalogues' sizes.
_QUERIES_PER_STEP, _ROWS_PER_STEP = 1 << 10, 1 << 15


def open_title_transfer(workdir: Path, *, path: str = "") -> TitleTransfer:
    """Opens a finished run and its catalogue as a source of titles.

    Args:
      workdir: folder of a finished run on a catalogue with titles.
      path: new path of its catalogue, if it was moved.

    Returns:
      A `TitleSource`.

    Raises:
      InputError: no run, not trained to its end, or its catalogue is missing, has changed or has no
        titles.
    """
    device_mesh = mesh.make_mesh()
    run = fit_run_to_devices(read_run(workdir), device_mesh, catalog_path=path)
    advice = "give the one it was trained on (--titles-catalog)"
    try:
        catalog = open_catalog(run.config.data)
    except InputError as error:
        raise InputError(f"the catalogue of run {workdir}: {error}; or {advice}") from error
    check_catalog_of_run(run, catalog, advice)
    train = catalog.splits["train"]
    titles = [train[i]["title"] for i in range(len(train))]
    titled = np.flatnonzero([bool(title.strip()) for title in titles])
    if not len(titled):
        raise InputError(
            f"{catalog.name}, the catalogue of run {workdir}, has no training photo with a title, "
            "wanted some to transfer; give a run on a catalogue with titles"
        )
    with jax.set_mesh(device_mesh):
        model = restore_params(run, device_mesh)
    return TitleTransfer(model, device_mesh, catalog, titled, [titles[i] for i in titled])


@dataclasses.dataclass
class _UnlabelledPhotos:
    """(image_id, encoded photo) as records without a class."""

    photos: Sequence[tuple[str, bytes]]

    def __post_init__(self) -> None:
        self.labels = np.zeros(len(self), np.int32)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Record:
        image_id, image = self.photos[index]
        return cast(Record, {"image_id": image_id, "image": image, "class_id": 0})


@dataclasses.dataclass(frozen=True)
class TitleTransfer:
    """Nearest-neighbour title transfer by the embeddings of a finished run; a `TitleSource`.

    Each photo without a title takes that of the nearest training photo of the run's catalogue. The
    authors of SICoT gave the photos of iMaterialist the title of the first hit of an image search.

    Attributes:
      model: the network of the finished run.
      device_mesh: the devices that its parameters are on.
      catalog: the run's catalogue.
      titled: training records with a title, int [N].
      titles: their N titles.
    """

    model: RestoredModel
    device_mesh: jax.sharding.Mesh
    catalog: Catalog
    titled: np.ndarray
    titles: Sequence[str]

    @property
    def provenance(self) -> dict[str, str]:
        """Where titles come from: {"run", "data_hash", "commit"}."""
        run = self.model.run
        return {
            "run": run.workdir.absolute().name,
            "data_hash": run.data_hash,
            "commit": run.commit,
        }

    def find_titles(self, photos: Sequence[tuple[str, bytes]]) -> list[TransferredTitle | None]:
        """Returns the title of each photo's nearest neighbour.

        Args:
          photos: (image_id, encoded photo) of Q photos.

        Returns:
          Q titles; None where the only photo with a title is the same photo.
        """
        positions, similarity = self.nearest_titled(photos)
        image_ids = self._titled_embeddings[0]
        return [
            TransferredTitle(self.titles[position], float(cosine), str(image_ids[position]))
            if position >= 0
            else None
            for position, cosine in zip(positions, similarity, strict=True)
        ]

    def nearest_titled(
        self, photos: Sequence[tuple[str, bytes]]
    ) -> tuple[Int[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
        """Finds the nearest photo with a title.

        The same photo (image_id) is never the nearest: its title would be looked up rather than
        transferred, and an agreement measured on photos of the run's catalogue would say nothing
        about new ones.

        Args:
          photos: (image_id, encoded photo) of Q photos.

        Returns:
          Position in `titled` of each photo's nearest neighbour, int64 [Q], -1 where there is none;
          and their cosine similarity, float32 [Q], -inf where there is none.
        """
        row_images, rows = self._titled_embeddings
        query_images, queries = self._embed(
            _photo_batches(self.model.run, _UnlabelledPhotos(photos))
        )
        ids = np.unique(np.concatenate([row_images, query_images]), return_inverse=True)[1].astype(
            np.int32
        )
        row_ids, query_ids = ids[: len(row_images)], ids[len(row_images) :]
        return nearest_neighbours(queries, rows, query_ids, row_ids, self.device_mesh)

    @functools.cached_property
    def _titled_embeddings(self) -> tuple[np.ndarray, np.ndarray]:
        """image_id [N] and embedding float32 [N, D] of the photos with a title.

        They stay in host memory: 2 GB for a million of D = 512.
        """
        distributed.print_primary(
            f"title transfer: embedding {len(self.titled)} photos of {self.catalog.name} by run "
            f"{self.model.run.workdir}"
        )
        return self._embed(
            _photo_batches(self.model.run, self.catalog.splits["train"], self.titled)
        )

    @functools.cached_property
    def _visual(self) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
        """Maps uint8 photos (labels are ignored) to {"embedding": v [B, D]}."""
        model = self.model
        embed_step = make_embed_step(model.preprocessing, model.graphs.visual)
        visual = model.params["visual"], model.batch_stats["visual"]
        # v >= 0, so no cosine is below 0.
        return lambda image, label: {"embedding": embed_step(*visual, image)}

    def _embed(self, batches: PhotoBatchLoader) -> tuple[np.ndarray, np.ndarray]:
        """Returns image_id [N] and v float32 [N, D]."""
        with jax.set_mesh(self.device_mesh):
            rows = map_photos(self._visual, batches, self.model.run.config, self.device_mesh)
        return rows["image_id"], rows["embedding"]


def _photo_batches(run: Run, split: Split, indices: np.ndarray | None = None) -> PhotoBatchLoader:
    indices = np.arange(len(split)) if indices is None else indices
    return PhotoBatchLoader(split, run.config.preprocessing, run.config.eval.batch_size, indices)


def nearest_neighbours(
    queries: Float[np.ndarray, "Q D"],
    rows: Float[np.ndarray, "N D"],
    query_ids: Int[np.ndarray, " Q"],
    row_ids: Int[np.ndarray, " N"],
    device_mesh: jax.sharding.Mesh,
) -> tuple[Int[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    """Finds the row with the largest cosine similarity to each query, exactly.

    Queries are divided over all devices; device memory does not grow with Q or N.

    Args:
      queries: float32 [Q, D].
      rows: float32 [N, D].
      query_ids: int32 [Q], at least 0.
      row_ids: int32 [N], at least 0; a row is never the neighbour of a query with the same id.
      device_mesh: the devices.

    Returns:
      Row of each query's neighbour, int64 [Q], the first of equals, -1 where there is none; and the
      cosine similarity, float32 [Q], -inf where there is none.
    """
    nearest = np.full(len(queries), -1, np.int64)
    similarity = np.full(len(queries), -np.inf, np.float32)
    num_queries = -(-min(_QUERIES_PER_STEP, len(queries)) // device_mesh.size) * device_mesh.size
    num_rows = min(_ROWS_PER_STEP, len(rows))
    with jax.set_mesh(device_mesh):
        for first in range(0, len(rows), num_rows):
            part = {
                "rows": l2_normalize(_padded(rows[first:], num_rows)),
                "row_ids": _padded(row_ids[first:], num_rows, -1),
            }
            part = mesh.replicate_tree(part, device_mesh)
            for start in range(0, len(queries), num_queries):
                end = min(start + num_queries, len(queries))
                batch = {
                    "queries": l2_normalize(_padded(queries[start:end], num_queries)),
                    "query_ids": _padded(query_ids[start:end], num_queries),
                }
                result = jax.device_get(_best_row(**mesh.to_global(batch, device_mesh), **part))
                best, cosine = (array[: end - start] for array in result)
                better = cosine > similarity[start:end]
                nearest[start:end][better] = first + best[better]
                similarity[start:end][better] = cosine[better]
    return nearest, similarity


@jax.jit
def _best_row(
    queries: jax.Array, query_ids: jax.Array, rows: jax.Array, row_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    cosine = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
    allowed = (query_ids[:, None] != row_ids[None, :]) & (row_ids >= 0)[None, :]
    cosine = jnp.where(allowed, cosine, -jnp.inf)
    return jnp.argmax(cosine, 1), jnp.max(cosine, 1)


def _padded(x: np.ndarray, length: int, value: int = 0) -> np.ndarray:
    """Returns the first `length` rows, filled up with `value`: one shape, one compilation."""
    x = x[:length]
    return np.pad(x, [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=value)
