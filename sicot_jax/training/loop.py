"""The training loop: from a config to a finished, evaluated run folder."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import jax

from sicot_jax.catalog.batches import HostBatch, prefetch, train_batch_loader
from sicot_jax.catalog.catalog import SPLITS, Catalog
from sicot_jax.catalog.open import open_catalog
from sicot_jax.catalog.statistics import head_mask
from sicot_jax.common.files import read_json
from sicot_jax.config import Config
from sicot_jax.errors import InputError, NotFinite, TrainingStopped
from sicot_jax.parallel import distributed, mesh
from sicot_jax.training import device_batches
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.evaluate import evaluate_locked_run
from sicot_jax.training.logging import RunLog
from sicot_jax.training.memory.fit import DoesNotFitError, compile_within_memory
from sicot_jax.training.memory.plan import make_memory_plan
from sicot_jax.training.memory.report import (
    alternative_lines,
    gradient_ratio_lines,
    memory_lines,
)
from sicot_jax.training.model import DataShape
from sicot_jax.training.pretrained import check_source
from sicot_jax.training.provenance import hardware_name
from sicot_jax.training.restore import restore_state
from sicot_jax.training.results import head_boundary
from sicot_jax.training.run import (
    RESULTS_FILE,
    check_same_on_all_processes,
    mesh_of_config,
    read_run,
    run_lock,
    start_or_resume,
)
from sicot_jax.training.setup import Setup, check_batch_sizes, make_setup
from sicot_jax.training.start import check_catalog, starting_state
from sicot_jax.training.state import TrainState, abstract_state
from sicot_jax.training.validation import Validator, is_finite


class StopSignals:
    """Notes SIGTERM and SIGINT while the context lasts; a second SIGINT interrupts at once.

    Attributes:
      received: number of the signal that came; None without one.
    """

    received: int | None

    def __enter__(self) -> StopSignals:
        self.received = None
        self._handlers: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """Name of the signal, for messages."""
        if self.received is None:
            return "a signal to another process"
        return signal.Signals(self.received).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        with contextlib.suppress(OSError):  # the terminal may be closed
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step, then saving; Ctrl-C stops at once\n")


def train(config: Config, workdir: Path, *, catalog: Catalog | None = None) -> dict[str, Any]:
    """Trains a run and evaluates it once on the test split.

    A run that was stopped resumes from its last checkpoint; a finished one is not trained again.

    Args:
      config: the run's config.
      workdir: the run folder.
      catalog: what `config.data` names; opened where it is not given.

    Returns:
      What the run's `results.json` holds.

    Raises:
      ConfigError: the config cannot run here, or the folder holds another run.
      CheckpointError: a checkpoint is damaged or of another model.
      TrainingStopped: a signal came, or a loss is not finite; what was saved is said.
    """
    with run_lock(workdir):
        with distributed.sync_errors():
            catalog = catalog or open_catalog(config.data)
        check_same_on_all_processes(config, catalog)
        finished = _finished_results(workdir, config, catalog)
        if finished is not None:
            return finished
        device_mesh = mesh_of_config(config)
        with jax.set_mesh(device_mesh):
            setup = make_setup(config, DataShape.of(catalog), device_mesh)
            check_batch_sizes(config, device_mesh)
            check_catalog(catalog, config)
            if config.model.init_from:
                check_source(config)
            start_or_resume(workdir, config, catalog)
            _Loop(setup, catalog, workdir).run()
            return evaluate_locked_run(read_run(workdir), catalog, device_mesh)


def _finished_results(workdir: Path, config: Config, catalog: Catalog) -> dict[str, Any] | None:
    """The results of a run that has ended, after checking that it is this one."""
    path = workdir / RESULTS_FILE
    if not distributed.broadcast_from_primary(path.exists()):
        return None
    start_or_resume(workdir, config, catalog)
    distributed.print_primary(f"{workdir}: finished before; its results are in {path.name}")
    return read_json(path, "the results of a finished run; remove it to evaluate again")


class _Due(NamedTuple):
    """What is due after a step."""

    validate: bool
    save: bool
    stop: bool


class _Loop:
    """One run: restores or starts, then steps, logs, validates and saves."""

    def __init__(self, setup: Setup, catalog: Catalog, workdir: Path):
        self.setup, self.catalog, self.workdir = setup, catalog, workdir
        self.config = setup.config
        self.memory_plan = make_memory_plan(
            setup.config, setup.shape, devices=setup.mesh.size, platform=jax.default_backend()
        )
        with distributed.sync_errors():
            self.loader = train_batch_loader(catalog, setup.config, device_batches.process_shard())
        self.triplets_digest = self._check_triplets()
        self.train_steps: dict[int, jax.stages.Compiled] = {}  # by batch size
        self.validator = Validator(setup, catalog)
        self.checkpoints = Checkpoints(workdir, num_classes=setup.shape.num_classes, writer=True)
        self.best_score = (self.checkpoints.info("best") or {}).get("validation")

    def run(self) -> None:
        """Trains the run to its end; writes checkpoints and the log."""
        setup = self.setup
        try:
            self._print_description()
            saved_step = self.checkpoints.latest_step()
            self._compile(setup.batch_plan.sizes(saved_step or 0, setup.total_steps))
            validation_due = False
            if saved_step is None:
                state = starting_state(setup, self.catalog)
            else:
                state, validation_due = self._resume()
            step = int(state.step)
            self.log = RunLog(
                self.workdir,
                start_step=step,
                total_steps=setup.total_steps,
                photos_before=setup.batch_plan.first_position,
                tensorboard=self.config.train.tensorboard,
            )
            with contextlib.closing(self.log):
                if validation_due:
                    self._validate(state, step)
                if step < setup.total_steps:
                    self._train(state)
        finally:
            self.checkpoints.wait()
            self.checkpoints.close()

    def _check_triplets(self) -> str:
        """Digest of the click triplets, the same in all processes; "" without."""
        triplets = self.loader.triplets
        if not triplets:
            return ""
        distributed.print_primary(f"triplets: {triplets.summary()}")
        distributed.check_same_on_all(
            "what can be drawn of data.triplets",
            triplets.digest,
            "give every process the same photos",
        )
        return triplets.digest

    def _print_description(self) -> None:
        catalog, setup, plan = self.catalog, self.setup, self.setup.batch_plan
        boundary = head_boundary(catalog, self.config)
        num_head = int(head_mask(catalog.classes.counts["train"], boundary).sum())
        first, last = plan.size(0), plan.size(setup.total_steps - 1)
        batch_size = first if first == last else f"{first} to {last}"
        sizes = ", ".join(f"{len(catalog.splits[split])} {split}" for split in SPLITS)
        distributed.print_primary(
            f"{self.workdir}: {catalog.name}, {setup.shape.num_classes} classes ({num_head} head: "
            f"more than {boundary} photos), {sizes} photos; {setup.total_steps} steps of "
            f"{batch_size} on {hardware_name(setup.mesh)}",
            *memory_lines(self.memory_plan),
            *gradient_ratio_lines(self.memory_plan),
        )

    def _compile(self, batch_sizes: Iterable[int]) -> None:
        """Compiles the steps before anything is allocated: a run that does not fit ends here."""
        distributed.print_primary("compiling the step")
        target = abstract_state(self.setup)
        try:
            with distributed.sync_errors():
                self.train_steps |= compile_within_memory(
                    self.memory_plan, self.setup, target, batch_sizes
                )
        except DoesNotFitError as error:
            lines = (
                memory_lines(error.plan),
                alternative_lines(error.plan, error.alternatives, error.memory),
            )
            distributed.print_primary(*itertools.chain(*lines))
            raise

    def _resume(self) -> tuple[TrainState, bool]:
        """The last state, and whether a signal came before its validation."""
        state = restore_state(self.setup, self.checkpoints)
        info = self.checkpoints.info("last") or {}
        if info.get("triplets", "") != self.triplets_digest:
            raise InputError(
                f"{self.config.data.queries or self.config.data.path}: not the query photos that "
                f"{self.workdir} began with; restore them, or use another --workdir"
            )
        distributed.print_primary(f"resuming {self.workdir} from step {int(state.step)}")
        return state, info.get("validate", False)

    def _batches(self, start: int) -> Generator[HostBatch]:
        data = self.config.data
        return prefetch(
            self.loader, start, self.setup.total_steps, workers=data.workers, source=data.source
        )

    def _train(self, state: TrainState) -> None:
        """Steps from a state to the end of the run.

        Losses are read one step late, so that the device never waits; nothing is saved before the
        losses of its step were read.
        """
        setup, plan = self.setup, self.setup.batch_plan
        first = int(state.step)
        # More where the newest checkpoint was damaged and this one is from before the batch grew.
        if missing := set(plan.sizes(first, setup.total_steps)) - self.train_steps.keys():
            self._compile(missing)
        hyperparams = mesh.replicate_tree(setup.hyperparams(), setup.mesh)
        device_photos = (
            device_batches.DevicePhotos(self.catalog, setup.mesh)
            if self.config.data.on_device
            else None
        )
        self.last_save, unread = time.monotonic(), None
        with StopSignals() as signals, contextlib.closing(self._batches(first)) as batches:
            for step, batch in enumerate(batches, first + 1):
                placed = (
                    device_photos(batch)
                    if device_photos
                    else device_batches.to_device(batch, setup.mesh)
                )
                train_step = self.train_steps[plan.size(step - 1)]
                state, losses = train_step(state, placed, hyperparams)
                if unread is not None:
                    self._read_losses(*unread)
                unread = step, losses
                due = self._due_after(step, signals)
                if any(due):
                    self._read_losses(*unread)
                    unread = None
                    self._pause(state, step, due, signals)

    def _due_after(self, step: int, signals: StopSignals) -> _Due:
        config = self.config.train
        validate = self._validates_after(step)
        # Clocks and signals differ between processes; asking the others waits for the step.
        asks = not distributed.is_multiprocess() or validate or step % config.log_every_steps == 0
        stop = asks and distributed.any_process(signals.received is not None)
        elapsed = time.monotonic() - self.last_save
        save = asks and distributed.broadcast_from_primary(
            elapsed > config.checkpoint_every_seconds
        )
        every = config.checkpoint_every_steps
        return _Due(validate, save or (bool(every) and step % every == 0), stop)

    def _validates_after(self, step: int) -> bool:
        epochs = self.config.train.evaluate_every_epochs
        every = max(1, round(epochs * self.setup.steps_per_epoch))
        return step == self.setup.total_steps or self.setup.batch_plan.crosses_multiple(step, every)

    def _pause(self, state: TrainState, step: int, due: _Due, signals: StopSignals) -> None:
        """Validates and saves what is due; raises TrainingStopped for a signal."""
        self.log.pause_clock()
        validate, save, stop = due
        if validate and not stop:
            self._validate(state, step)
            validate = False
            # A signal that came meanwhile is not left for the next time.
            stop = distributed.any_process(signals.received is not None)
        if save or stop or step == self.setup.total_steps:
            self._check_finite(state, step)
            # A validation that a signal has put off is done by the resumed run.
            info = {"validate": validate, "triplets": self.triplets_digest}
            self.checkpoints.save(state, step, info=info)
            self.last_save = time.monotonic()
        self.log.resume_clock()
        if stop:
            self.checkpoints.wait()
            raise TrainingStopped(
                f"{signals.name}: saved at step {step}; the same command goes on from there"
            )

    def _read_losses(self, step: int, losses: dict[str, jax.Array]) -> None:
        """Fetches a step's losses, stops on one that is not finite, logs now and then."""
        values = {name: float(value) for name, value in losses.items()}
        if not math.isfinite(values["total"]):
            self.log.write_scalars(step, "train", values)
            raise self._not_finite(
                f"loss is {values['total']} at step {step}, wanted a finite number"
            )
        if step % self.config.train.log_every_steps == 0 or step == self.setup.total_steps:
            self.log.progress(step, values)

    def _check_finite(self, state: TrainState, step: int) -> None:
        """A step's loss is of the parameters before its update; saved are those after it."""
        if not is_finite(state):
            raise self._not_finite(f"parameters are not finite after step {step}")

    def _not_finite(self, problem: str) -> NotFinite:
        saved_step = self.checkpoints.latest_step()
        last = (
            f"the last good checkpoint is of step {saved_step}"
            if saved_step
            else "no checkpoint was saved yet"
        )
        return NotFinite(
            f"{problem}; {last}; lower optim.learning_rate or add optim.warmup_epochs and train in "
            "another --workdir"
        )

    def _validate(self, state: TrainState, step: int) -> None:
        """Validates a state; one that is better than all before becomes the best checkpoint."""
        result = self.validator(state)
        if result is None:
            return
        self.log.write_scalars(step, "validation", result.scalars)
        is_best = self.best_score is None or result.score > self.best_score
        self.log.message(
            f"epoch {self.setup.epoch_at(step):.2f}  validation top-1: {result.summary}"
            f"{'  (best)' if is_best else ''}"
        )
        if is_best:
            self._check_finite(state, step)
            self.checkpoints.save(state, step, kind="best", info={"validation": result.score})
            self.best_score = result.score
