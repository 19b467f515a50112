"""A run folder: the config, catalogue and code of a training run, and the lock on the folder.

config.json          config, hashes of the catalogue, version and commit of the code
classes.csv          class table of the catalogue
words.txt, ...       tokenizer of the catalogue
checkpoints/         see `training.checkpoint`
log.jsonl            see `training.logging`
results.json, predictions.npz    see `training.results`
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sicot_jax._version import __version__
from sicot_jax.catalog.catalog import Catalog, ClassTable, Tokenizer
from sicot_jax.catalog.sources.tables import CLASSES_FILE, read_class_table, write_class_table
from sicot_jax.catalog.title_variants import EncodedSplit
from sicot_jax.catalog.tokenizer import load_tokenizer
from sicot_jax.common.files import file_lock, read_json, write_json
from sicot_jax.config import (
    CONFIG_FORMAT,
    FREE_ON_RESUME,
    Config,
    ConfigError,
    DataConfig,
    config_to_dict,
    flatten_config,
    load_config,
    read_flat_config,
)
from sicot_jax.errors import InputError
from sicot_jax.parallel import distributed, mesh
from sicot_jax.training.model import DataShape
from sicot_jax.training.provenance import (
    class_table_hash,
    code_commit,
    triplets_hash,
    vocabulary_hash,
)

CONFIG_FILE, RESULTS_FILE = "config.json", "results.json"
_WANTED = "the config.json of a training run (is it a run's --workdir?)"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder and what its `config.json` holds.

    Attributes:
      workdir: the folder.
      config: the run's config.
      shape: sizes of the catalogue that it was trained on.
      data_hash: hash of that catalogue.
      class_table_hash: see `provenance.class_table_hash`.
      vocabulary_hash: see `provenance.vocabulary_hash`.
      commit: see `provenance.code_commit`.
    """

    workdir: Path
    config: Config
    shape: DataShape
    data_hash: str
    class_table_hash: str
    vocabulary_hash: str
    commit: str

    @property
    def class_table_path(self) -> Path:
        """The run's `classes.csv`."""
        return self.workdir / CLASSES_FILE

    def class_table(self) -> ClassTable:
        """Returns the products of the run's classes, in the order of class ids."""
        return read_class_table(self.class_table_path)

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of the catalogue that the run was trained on."""
        return load_tokenizer(self.workdir)

    def total_steps(self) -> int:
        """Returns the updates of the complete run."""
        return self.config.train.total_steps(self.shape.train_photos)


def read_run(workdir: Path) -> Run:
    """Reads what a run folder says about its run.

    Args:
      workdir: the run folder.

    Returns:
      The run.

    Raises:
      InputError: the folder is not a run.
    """
    path = workdir / CONFIG_FILE
    stored = read_json(path, _WANTED)
    config, data = load_config(str(path)), stored["data"]
    return Run(
        workdir=workdir,
        config=config,
        shape=DataShape(**data["shape"]),
        data_hash=data["hash"],
        class_table_hash=data["class_table"],
        vocabulary_hash=data["vocabulary"],
        commit=stored["commit"],
    )


def describe_run(config: Config, catalog: Catalog) -> dict[str, Any]:
    """Returns what `config.json` says about a run.

    Args:
      config: the run's config.
      catalog: catalogue that it is trained on.

    Returns:
      A tree that JSON can hold.
    """
    return {
        "format": CONFIG_FORMAT,
        "version": __version__,
        "commit": code_commit(),
        "config": config_to_dict(config),
        "data": {
            "name": catalog.name,
            "hash": catalog.data_hash,
            "class_table": class_table_hash(catalog),
            "vocabulary": vocabulary_hash(catalog.tokenizer),
            "shape": dataclasses.asdict(DataShape.of(catalog)),
            "triplets": triplets_hash(config.data),
        },
    }


def start_or_resume(workdir: Path, config: Config, catalog: Catalog) -> None:
    """Writes the files that describe a new run, or checks that the folder holds this very run.

    A folder without a checkpoint holds nothing that another config could spoil, and is started from
    scratch. Fields of FREE_ON_RESUME (mesh, paths, ...) may differ; their new values are kept.

    Args:
      workdir: the run folder.
      config: the run's config.
      catalog: catalogue that it is trained on.

    Raises:
      ConfigError: the folder holds another run; names every difference.
    """
    path = workdir / CONFIG_FILE
    # Entries that are no number are what Orbax left half written.
    saved = any(entry.name.isdigit() for entry in (workdir / "checkpoints").glob("*/*"))
    started = saved or (workdir / RESULTS_FILE).exists()
    if not path.exists() or not started:
        if distributed.is_primary():
            workdir.mkdir(parents=True, exist_ok=True)
            write_class_table(workdir / CLASSES_FILE, catalog.classes)
            catalog.tokenizer.save(workdir)
            write_json(path, describe_run(config, catalog))
        return
    if differences := _differences(path, config, catalog):
        raise ConfigError(
            f"{workdir} holds another run ({'; '.join(differences)}); use another --workdir or "
            "remove that one"
        )
    stored, current = read_json(path, _WANTED), json.loads(json.dumps(config_to_dict(config)))
    if stored["config"] != current and distributed.is_primary():
        write_json(path, {**stored, "config": current})


def _differences(path: Path, config: Config, catalog: Catalog) -> list[str]:
    """What makes the run of a config.json another one, "name: before -> now"; none if the same."""
    before = read_flat_config(path)
    now = flatten_config(json.loads(json.dumps(config_to_dict(config))))
    differences = [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in FREE_ON_RESUME
    ]
    data = read_json(path, _WANTED)["data"]
    if data["hash"] != catalog.data_hash:
        differences.append(
            f"data: {data['hash'][:12]} -> {catalog.data_hash[:12]}"
            f"{version_hint(config.data, data['hash'])}"
        )
    elif config.loss.with_text and (
        data["vocabulary"] != (words := vocabulary_hash(catalog.tokenizer))
    ):
        differences.append(
            f"words of equal titles: {data['vocabulary'][:12]} -> {words[:12]}, as another version "
            "of sentencepiece or Python makes them; import with the first ones, or copy the "
            "catalogue"
        )
    triplets = data["triplets"], triplets_hash(config.data)
    if triplets[0] != triplets[1]:
        differences.append(
            f"triplets: {triplets[0][:12] or 'none'} -> {triplets[1][:12] or 'none'}"
        )
    return differences


def check_same_on_all_processes(config: Config, catalog: Catalog) -> None:
    """Raises InputError where processes of one run would train different things.

    Paths of the catalogue may differ between processes.

    Args:
      config: this process's config.
      catalog: this process's catalogue.

    Raises:
      InputError: config, version, catalogue or its word vectors differ between processes.
    """
    with distributed.sync_errors():
        triplets = triplets_hash(config.data)
    replaced = {"data.path": "", "data.queries": "", "data.triplets": triplets}
    settings = flatten_config(config_to_dict(config)) | replaced | {"version": __version__}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    distributed.check_same_on_all(
        "the config", digest, "start every process with the same command and version"
    )
    distributed.check_same_on_all(
        "the catalogue", catalog.data_hash, "give every process the same one"
    )
    # The data hash does not cover what depends on processor and library versions.
    advice = "copy one import to all machines: other processors or versions make other ones"
    distributed.check_same_on_all("the vocabulary", vocabulary_hash(catalog.tokenizer), advice)
    if distributed.is_multiprocess() and config.loss.with_semantic:
        vectors = hashlib.sha256(np.ascontiguousarray(catalog.word_vectors).tobytes()).hexdigest()
        distributed.check_same_on_all(
            "the word vectors",
            vectors,
            f"{advice}; a generated catalogue takes --config.data.generated.word_vectors=random",
        )


def check_catalog_of_run(run: Run, catalog: Catalog, advice: str) -> None:
    """Raises InputError unless a catalogue is the one that a run was trained on.

    Args:
      run: the run.
      catalog: opened by the run's config.
      advice: end of the message: what to do.

    Raises:
      InputError: another catalogue.
    """
    if catalog.data_hash != run.data_hash:
        data = run.config.data
        raise InputError(
            f"{run.workdir} was trained on data {run.data_hash[:12]}"
            f"{version_hint(data, run.data_hash)}; "
            f"{data.path or 'the catalogue'} is {catalog.data_hash[:12]}; {advice}"
        )


def with_words_of(run: Run, catalog: Catalog) -> Catalog:
    """Returns a run's catalogue with training titles in the words of the run.

    Equal data may have other words where another version of sentencepiece or Python made them.

    Args:
      run: the run.
      catalog: catalogue that it was trained on.

    Returns:
      The catalogue itself where its words are the run's.
    """
    if vocabulary_hash(catalog.tokenizer) == run.vocabulary_hash:
        return catalog
    tokenizer = run.tokenizer()
    splits = {**catalog.splits}
    splits["train"] = EncodedSplit(catalog.splits["train"], tokenizer)
    return dataclasses.replace(catalog, tokenizer=tokenizer, splits=splits)


def version_hint(data: DataConfig, data_hash: str) -> str:
    """Returns where an older version of an imported catalogue with that hash is.

    Args:
      data: section `data` of a config.
      data_hash: hash of the catalogue that is wanted.

    Returns:
      ", which FOLDER holds", or "" where there is none.
    """
    if data.source == "imported":
        from sicot_jax.catalog.sources import imported

        for folder in imported.version_folders(imported.newest_version(Path(data.path)).parent):
            with contextlib.suppress(InputError):  # a damaged version cannot be the wanted one
                if imported.read_description(folder)["data_hash"] == data_hash:
                    return f", which {folder} holds"
    return ""


@contextlib.contextmanager
def run_lock(workdir: Path) -> Iterator[None]:
    """Locks a run folder for all processes of one run; creates it where there is none.

    Args:
      workdir: the run folder.

    Yields:
      None, while the folder is locked.

    Raises:
      ConfigError: another run trains in it.
      InputError: it is not the same folder for all processes.
    """
    path = workdir / ".lock"
    with contextlib.ExitStack() as stack:
        with distributed.sync_errors():
            workdir.mkdir(parents=True, exist_ok=True)
            if distributed.is_primary():
                refusal = ConfigError(
                    f"{workdir}: another process is training there; wait for it or use another "
                    "--workdir"
                )
                stack.enter_context(file_lock(path, refusal))
                path.write_text(secrets.token_hex())
        token = path.read_bytes() if path.exists() else b""
        distributed.check_same_on_all(
            f"the run folder {workdir}",
            hashlib.sha256(token).hexdigest(),
            "give every process the same folder, one that all machines share",
        )
        yield


def fit_run_to_devices(run: Run, device_mesh: jax.sharding.Mesh, *, catalog_path: str = "") -> Run:
    """Returns a run with evaluation batches that these devices can divide.

    Args:
      run: the run.
      device_mesh: the devices.
      catalog_path: new path of its catalogue, if it was moved.

    Returns:
      The run with `eval.batch_size` rounded up and `data.path` replaced.
    """
    config = run.config
    batch_size = -(-config.eval.batch_size // device_mesh.size) * device_mesh.size
    config = dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, batch_size=batch_size),
        data=dataclasses.replace(config.data, path=catalog_path or config.data.path),
    )
    return dataclasses.replace(run, config=config)


def mesh_of_config(config: Config) -> jax.sharding.Mesh:
    """Returns the device mesh that a config asks for.

    Args:
      config: its section `mesh` says how many devices.

    Returns:
      The mesh.

    Raises:
      InputError: there are fewer devices.
    """
    return mesh.make_mesh(data=config.mesh.data, model=config.mesh.model)
