"""Titles for photos without one: each takes that of the nearest photo of another catalogue, as a
finished run sees them.

As SICoT's authors did for iMaterialist, whose photos they gave the title of the first hit of an
image search.
"""

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
from sicot_jax.catalog.catalog import Catalog, Record
from sicot_jax.catalog.importing.title_source import Borrowed
from sicot_jax.catalog.open import open_catalog
from sicot_jax.errors import InputError
from sicot_jax.parallel import distributed as hosts
from sicot_jax.parallel import mesh
from sicot_jax.training import evaluate
from sicot_jax.training import run as runs
from sicot_jax.training.state import TrainState
from sicot_jax.training.setup import Setup

# One piece of the search: 128 MiB of similarities over all devices, whatever the catalogues' sizes.
_QUERIES, _ROWS = 1 << 10, 1 << 15


def open_lender(workdir: Path, *, path: str = "") -> Lender:
    """The finished run in `workdir` and its catalogue, which `path` says where to find if it was
    moved.

    Raises InputError in one line: no run, not trained to its end, its catalogue missing, another
      one or without titles.
    """
    device_mesh = mesh.make_mesh()
    run = runs.on_devices_here(runs.read_run(workdir), device_mesh, path)
    remedy = "give the one it was trained on (--titles-path)"
    try:
        catalog = open_catalog(run.config.data)
    except InputError as error:
        raise InputError(f"the catalogue of run {workdir}: {error}; or {remedy}") from error
    runs.check_data(run, catalog, remedy)
    train = catalog.splits["train"]
    titles = [train[i]["title"] for i in range(len(train))]
    titled = np.flatnonzero([bool(title.strip()) for title in titles])
    if not len(titled):
        raise InputError(
            f"{catalog.name}, the catalogue of run {workdir}, has no training photo with a title, wanted some to lend; "
            "give a run on a catalogue with titles"
        )
    with jax.set_mesh(device_mesh):
        setup, state = runs.restore_finished(run, device_mesh)
    return Lender(run, catalog, setup, state, titled, [titles[i] for i in titled])


@dataclasses.dataclass(frozen=True)
class _Given:
    """(image_id, encoded photo) as records, of no class yet."""

    photos: Sequence[tuple[str, bytes]]

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int32)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Record:
        image_id, image = self.photos[index]
        return cast(Record, {"image_id": image_id, "image": image, "class_id": 0})


@dataclasses.dataclass(frozen=True)
class Lender:
    """A finished run as a `TitleLender`: `titled` int [N] are the training records with a title,
    `titles` theirs.
    """

    run: runs.Run
    catalog: Catalog
    setup: Setup
    state: TrainState
    titled: np.ndarray
    titles: Sequence[str]

    @property
    def about(self) -> dict[str, str]:
        return {
            "run": self.run.workdir.absolute().name,
            "data_hash": self.run.data_hash,
            "commit": self.run.commit,
        }

    def __call__(self, photos: Sequence[tuple[str, bytes]]) -> list[Borrowed | None]:
        places, similarity = self.nearest(photos)
        return [
            Borrowed(self.titles[place], float(cosine), str(self._bank[0][place]))
            if place >= 0
            else None
            for place, cosine in zip(places, similarity, strict=True)
        ]

    def nearest(self, photos: Sequence[tuple[str, bytes]]) -> tuple[np.ndarray, np.ndarray]:
        """Place in `titled` of each photo's nearest, int [Q], and their cosine, float32 [Q]; -1 and
        -inf where none is.

        The same photo (image_id) is never the nearest: its title would be found rather than
        borrowed, and agreement measured on photos that the run's catalogue holds would say nothing
        of new ones.
        """
        (bank_ids, bank), (ids, queries) = (
            self._bank,
            self._embed(_batches(self.run, _Given(photos))),
        )
        numbers = np.unique(np.concatenate([bank_ids, ids]), return_inverse=True)[1].astype(
            np.int32
        )
        return nearest(
            queries, bank, numbers[len(bank_ids) :], numbers[: len(bank_ids)], self.setup.mesh
        )

    @functools.cached_property
    def _bank(self) -> tuple[np.ndarray, np.ndarray]:
        """image_id [N] and embedding float32 [N, D] of the photos with a title: on the host, 2 GB
        for a million of D = 512.
        """
        hosts.say(
            f"borrowing titles: {len(self.titled)} photos of {self.catalog.name} as {self.run.workdir} sees them"
        )
        return self._embed(_batches(self.run, self.catalog.splits["train"], self.titled))

    @functools.cached_property
    def _visual(self) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
        """(uint8 photos, labels that it does not read) -> {"embedding": v [B, D]}."""
        embed = evaluate.make_embed(self.run.config.preprocessing, self.setup.visual_graphdef)
        visual = self.state.params["visual"], self.state.batch_stats["visual"]
        return lambda image, label: {
            "embedding": embed(*visual, image)
        }  # v >= 0, so no cosine is below 0

    def _embed(self, batches: PhotoBatchLoader) -> tuple[np.ndarray, np.ndarray]:
        """image_id [N], v float32 [N, D]."""
        with jax.set_mesh(self.setup.mesh):
            rows = evaluate.over_photos(self._visual, batches, self.run.config, self.setup.mesh)
        return rows["image_id"], rows["embedding"]


def _batches(run: runs.Run, split, indices: np.ndarray | None = None) -> PhotoBatchLoader:
    indices = np.arange(len(split)) if indices is None else indices
    return PhotoBatchLoader(split, run.config.preprocessing, run.config.eval.batch_size, indices)


def nearest(
    queries: np.ndarray,
    rows: np.ndarray,
    query_ids: np.ndarray,
    row_ids: np.ndarray,
    device_mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Row of the largest cosine to each query, int64 [Q], and that cosine, float32 [Q]; the first
    row of equals.

    Queries [Q, D], rows [N, D], ids int32 >= 0: a query and a row of the same id never meet; -1 and
    -inf where no row is left. Queries are divided over all devices; memory beside the arguments
    does not grow with Q or N.
    """
    place, similarity = (
        np.full(len(queries), -1, np.int64),
        np.full(len(queries), -np.inf, np.float32),
    )
    size = -(-min(_QUERIES, len(queries)) // device_mesh.size) * device_mesh.size
    length = min(_ROWS, len(rows))
    with jax.set_mesh(device_mesh):
        for first in range(0, len(rows), length):
            part = {
                "rows": _unit(_padded(rows[first:], length)),
                "row_ids": _padded(row_ids[first:], length, -1),
            }
            part = mesh.copy_to_all(part, device_mesh)
            for start in range(0, len(queries), size):
                end = min(start + size, len(queries))
                batch = {
                    "queries": _unit(_padded(queries[start:end], size)),
                    "query_ids": _padded(query_ids[start:end], size),
                }
                found = jax.device_get(_best(**mesh.to_global(batch, device_mesh), **part))
                best, cosine = (array[: end - start] for array in found)
                better = cosine > similarity[start:end]
                place[start:end][better] = first + best[better]
                similarity[start:end][better] = cosine[better]
    return place, similarity


@jax.jit
def _best(queries, query_ids, rows, row_ids):
    cosine = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
    allowed = (query_ids[:, None] != row_ids[None, :]) & (row_ids >= 0)[None, :]
    cosine = jnp.where(allowed, cosine, -jnp.inf)
    return jnp.argmax(cosine, 1), jnp.max(cosine, 1)


def _padded(x: np.ndarray, length: int, value: int = 0) -> np.ndarray:
    """The first `length` rows, filled up with `value`: one shape, one compilation."""
    x = x[:length]
    return np.pad(x, [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=value)


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of zeros stay."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
