"""A run folder: what was run, on which data, with which code; and its state, brought back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sicot_jax import config as config_lib
from sicot_jax._version import __version__
from sicot_jax.catalog.catalog import Catalog, Tokenizer
from sicot_jax.catalog.open import open_catalog
from sicot_jax.catalog.sources.tables import CLASSES_FILE, write_class_table
from sicot_jax.common.files import atomic_file, file_sha256, read_json, write_json
from sicot_jax.common.locks import file_lock
from sicot_jax.config import Config, ConfigError, DataConfig
from sicot_jax.errors import InputError
from sicot_jax.parallel import distributed
from sicot_jax.parallel import mesh
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.evaluate import class_table_hash
from sicot_jax.training.model import DataShape
from sicot_jax.training.setup import Setup, make_setup
from sicot_jax.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class Run:
    """`config.json` of a run folder."""

    workdir: Path
    config: Config
    shape: DataShape
    data_hash: str
    class_table: str
    vocabulary: str
    commit: str


def describe(config: Config, catalog: Catalog) -> dict[str, Any]:
    return {
        "format": config_lib.CONFIG_FORMAT,
        "version": __version__,
        "commit": commit(),
        "config": config_lib.config_to_dict(config),
        "data": {
            "name": catalog.name,
            "hash": catalog.data_hash,
            "class_table": class_table_hash(catalog),
            "vocabulary": vocabulary_hash(catalog.tokenizer),
            "shape": dataclasses.asdict(DataShape.of(catalog)),
            "triplets": triplets_hash(config.data),
        },
    }


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """Equal where word ids mean the same words."""
    return hashlib.sha256("\n".join(tokenizer.vocabulary).encode()).hexdigest()


def triplets_hash(data: DataConfig) -> str:
    """SHA-256 of the file of `data.triplets`, "" where there is none to be. InputError where it is
    missing.
    """
    if not data.triplets:
        return ""
    try:
        return file_sha256(Path(data.triplets))
    except OSError as error:
        raise InputError(
            f"data.triplets={data.triplets}: {error.strerror}; wanted the Parquet file of `sicot events triplets`"
        ) from error


def commit() -> str:
    """Commit of the checkout this code runs from, "+" where it has changes; "" for an installed
    package.
    """
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        name = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.strip() + ("+" if changed.stdout.strip() else "")


def hardware(device_mesh) -> str:
    device = device_mesh.devices.flat[0]
    return (
        f"{device_mesh.size} x {device.device_kind} ({platform.machine()}), jax {jax.__version__}"
    )


def read_run(workdir: Path) -> Run:
    """ConfigError where the folder is not a run."""
    path = workdir / "config.json"
    stored = read_json(path, "the config.json of a training run (is it a run's --workdir?)")
    config, data = config_lib.load_config(str(path)), stored["data"]
    return Run(
        workdir,
        config,
        DataShape(**data["shape"]),
        data["hash"],
        data["class_table"],
        data.get(
            "vocabulary", ""
        ),  # "" in runs of before it was kept: no vocabulary is the same then
        stored.get("commit", ""),
    )


def start_or_continue(workdir: Path, config: Config, catalog: Catalog) -> None:
    """Write `config.json`, or check that the run already there is the same one. ConfigError names
    every difference.
    """
    path = workdir / "config.json"
    new = describe(config, catalog)
    # Entries that are no number are what Orbax left half written.
    saved = any(entry.name.isdigit() for entry in (workdir / "checkpoints").glob("*/*"))
    started = saved or (workdir / "results.json").exists()
    if (
        not path.exists() or not started
    ):  # a run without a checkpoint holds nothing that another config could spoil
        if distributed.is_primary():
            workdir.mkdir(parents=True, exist_ok=True)
            write_class_table(workdir / CLASSES_FILE, catalog.classes)
            write_json(path, new)
        return
    old = read_json(path, "the config.json of this run")
    different = differences_of(path, config, catalog)
    if not different:
        now = json.loads(json.dumps(new["config"]))
        if (
            old["config"] != now and distributed.is_primary()
        ):  # another mesh, path or batch size: used from now on
            write_json(path, {**old, "config": now})
        return
    raise ConfigError(
        f"{workdir} holds another run ({'; '.join(different)}); use another --workdir or remove that one"
    )


def class_table_file(run: Run) -> Path:
    """The run's `classes.csv`; made from its catalogue where the run is from before it was kept.

    InputError where that catalogue is gone, or another one by now.
    """
    path = run.workdir / CLASSES_FILE
    if not path.exists():
        catalog = open_catalog(run.config.data)
        check_data(run, catalog, "give the catalogue back its place: the run needs its class table")
        with atomic_file(path) as temporary:
            write_class_table(temporary, catalog.classes)
    return path


def differences_of(path: Path, config: Config, catalog: Catalog) -> list[str]:
    """What makes the run with that config.json another one than `config` on `catalog`, a line each;
    none for the same run.
    """
    before, now = (
        config_lib.read_flat_config(path),
        config_lib.flatten_config(json.loads(json.dumps(config_lib.config_to_dict(config)))),
    )
    different = [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in config_lib.FREE_ON_RESUME
    ]
    data = read_json(path, "the config.json of this run")["data"]
    old = data["hash"]
    if old != catalog.data_hash:
        different.append(
            f"data: {old[:12]} -> {catalog.data_hash[:12]}{same_data(config.data, old)}"
        )
    triplets = data.get("triplets", ""), triplets_hash(config.data)
    if triplets[0] != triplets[1]:
        different.append(f"triplets: {triplets[0][:12] or 'none'} -> {triplets[1][:12] or 'none'}")
    return different


def check_same_everywhere(config: Config, catalog: Catalog) -> None:
    """InputError where processes of one run would train different things; where the catalogue lies
    is each one's own.
    """
    with distributed.sync_errors():
        triplets = triplets_hash(config.data)
    places = {"data.path": "", "data.queries": "", "data.triplets": triplets}
    settings = config_lib.flatten_config(config_lib.config_to_dict(config)) | places | {"version": __version__}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    distributed.check_same_on_all("the config", digest, "start every process with the same command and version")
    distributed.check_same_on_all("the catalogue", catalog.data_hash, "give every process the same one")


def same_data(data: DataConfig, data_hash: str) -> str:
    """Where an older version of an imported catalogue is the one wanted: ", which PATH holds", else
    "".
    """
    if data.source == "imported":
        from sicot_jax.catalog.sources import imported

        for folder in imported.version_folders(imported.newest_version(Path(data.path)).parent):
            with contextlib.suppress(InputError):  # that of a version that nobody asked for
                if imported.read_description(folder)["data_hash"] == data_hash:
                    return f", which {folder} holds"
    return ""


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Hold the run folder, one process for all of its run; ConfigError when another one trains in
    it, or where it is not the same folder for all.
    """
    path = workdir / ".lock"
    with contextlib.ExitStack() as held:
        with distributed.sync_errors():
            workdir.mkdir(parents=True, exist_ok=True)
            if distributed.is_primary():
                refusal = ConfigError(
                    f"{workdir}: another process is training there; wait for it or use another "
                    "--workdir"
                )
                held.enter_context(file_lock(path, refusal))
                path.write_text(secrets.token_hex())
        seen = path.read_bytes() if path.exists() else b""
        remedy = "give every process the same folder, one that all machines share"
        distributed.check_same_on_all(f"the run folder {workdir}", hashlib.sha256(seen).hexdigest(), remedy)
        yield


def restore_best(run: Run, device_mesh) -> tuple[Setup, TrainState, int]:
    """Setup, the run's best checkpoint (the last one where it has no validation photos), and the
    steps it was trained.

    On this mesh, under `jax.set_mesh`. The optimizer's state, as large as all parameters, stays on
    disk.
    """
    setup = make_setup(run.config, run.shape, device_mesh)
    checkpoints = Checkpoints(run.workdir, num_classes=run.shape.num_classes)
    try:
        kind = "best" if checkpoints.latest_step("best") is not None else "last"
        state = checkpoints.restore(_without_optimizer(abstract_state(setup)), kind, partial=True)
        return setup, state, int(state.step) if kind == "last" else checkpoints.latest_step() or 0
    finally:
        checkpoints.close()


def _without_optimizer(state: TrainState) -> TrainState:
    classifier = dataclasses.replace(state.classifier, opt_state=(), sampling={})
    return dataclasses.replace(state, opt_state=(), unsent={}, classifier=classifier)


def restore_finished(run: Run, device_mesh) -> tuple[Setup, TrainState]:
    """`restore_best`; InputError where the run is not trained to its end."""
    setup, state, trained = restore_best(run, device_mesh)
    if trained < setup.steps:
        raise InputError(
            f"{run.workdir} is trained for {trained} of {setup.steps} steps; the command that started it goes on from there"
        )
    return setup, state


def on_devices_here(run: Run, device_mesh, path: str = "") -> Run:
    """The run with batches of photos that these devices divide, and its catalogue at `path`, if it
    was moved.
    """
    config = run.config
    batch = -(-config.eval.batch_size // device_mesh.size) * device_mesh.size
    data = dataclasses.replace(config.data, path=path or config.data.path)
    config = dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, batch_size=batch), data=data
    )
    return dataclasses.replace(run, config=config)


def check_data(run: Run, catalog: Catalog, remedy: str) -> None:
    """InputError unless `catalog`, opened by the run's config, is the one that it was trained on."""
    if catalog.data_hash != run.data_hash:
        data = run.config.data
        raise InputError(
            f"{run.workdir} was trained on data {run.data_hash[:12]}{same_data(data, run.data_hash)}; "
            f"{data.path or 'the catalogue'} is {catalog.data_hash[:12]}; {remedy}"
        )


def start_mesh(config: Config) -> jax.sharding.Mesh:
    return mesh.make_mesh(data=config.mesh.data, model=config.mesh.model)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
