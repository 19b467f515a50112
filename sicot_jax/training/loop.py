"""The training loop: from a config to a finished, evaluated run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sicot_jax._version import __version__
from sicot_jax.catalog.batches import HostBatch, train_batch_loader
from sicot_jax.catalog.catalog import SPLITS, Catalog
from sicot_jax.catalog.open import open_catalog
from sicot_jax.catalog.prefetch import prefetch
from sicot_jax.catalog.statistics import head_mask
from sicot_jax.classifier.shared_word_weights import class_words, start_word_rows
from sicot_jax.common import files
from sicot_jax.config import Config
from sicot_jax.errors import InputError, NotFinite, TrainingStopped
from sicot_jax.models.semantic_stream import set_word_vectors
from sicot_jax.parallel import distributed
from sicot_jax.parallel import mesh
from sicot_jax.training import device_batches, evaluate
from sicot_jax.training import error_analysis as findings
from sicot_jax.training import run as runs
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.logging import RunLog
from sicot_jax.training.memory import fit, plan
from sicot_jax.training.memory import report as plan_report
from sicot_jax.training.state import TrainState, abstract_state, class_log_prior, initial_state
from sicot_jax.training.setup import Setup, check_batch_sizes, make_setup
from sicot_jax.training.model import DataShape, num_word_columns
from sicot_jax.training.warm_start import check_source, warm_start


def train(config: Config, workdir: Path, *, catalog: Catalog | None = None) -> dict[str, Any]:
    """Train (or resume, or find finished) the run in `workdir`, evaluate it once on the test split,
    return the results.

    Raises ConfigError, CheckpointError, or TrainingStopped (a signal, or a loss that is not
    finite).
    """
    with runs.alone(workdir):
        with distributed.sync_errors():
            catalog = catalog or open_catalog(config.data)
        runs.check_same_everywhere(config, catalog)
        finished = finished_results(workdir, config, catalog)
        if finished is not None:
            return finished
        device_mesh = runs.start_mesh(config)
        with jax.set_mesh(device_mesh):
            setup = make_setup(config, DataShape.of(catalog), device_mesh)
            check_batch_sizes(config, device_mesh)
            check_catalog(catalog, config)
            if config.model.init_from:
                check_source(config)
            runs.start_or_continue(workdir, config, catalog)
            _Loop(setup, catalog, workdir).run()
            return _test(runs.read_run(workdir), catalog, device_mesh)


def check_catalog(catalog: Catalog, config: Config) -> None:
    """InputError for what would be found out after the last step."""
    if config.data.source == "arrays":
        got = np.asarray(catalog.splits["train"][0]["image"]).shape[:2]
        wanted = config.preprocessing.resize_height, config.preprocessing.resize_width
        if got != wanted:  # cut to size at export: resizing them again would not be the same
            raise InputError(
                f"{config.data.path} holds photos of {got[0]}x{got[1]}, the config wants {wanted[0]}x{wanted[1]}; export "
                "again with this config"
            )
        for name, made_with in catalog.resized_by.items():
            if made_with != getattr(config.preprocessing, name):
                raise InputError(
                    f"{config.data.path} holds photos made with preprocessing.{name}={made_with}, the config wants "
                    f"{getattr(config.preprocessing, name)}; export again with this config"
                )
    if not len(catalog.splits["test"]):
        raise InputError(
            f"{catalog.name} has no test photos (classes of under 4 photos give none); add photos, or a split column to "
            "the manifest"
        )
    if not len(catalog.splits["validation"]):
        distributed.print_primary(
            f"{catalog.name} has no validation photos: the last state is tested, not the best"
        )


def finished_results(workdir: Path, config: Config, catalog: Catalog) -> dict[str, Any] | None:
    """The results of a run that has ended, after checking that it is this one."""
    path = workdir / "results.json"
    if not distributed.broadcast_from_primary(path.exists()):
        return None
    runs.start_or_continue(workdir, config, catalog)
    distributed.print_primary(f"{workdir}: finished before; its results stand in {path.name}")
    return files.read_json(path, "the results of a finished run; remove it to evaluate again")


def test(workdir: Path, *, path: str = "") -> dict[str, Any]:
    """Evaluate a finished run's best checkpoint on the test split, on all devices here: writes
    `results.json` and `predictions.npz`.

    `path` says where the run's catalogue is now, if it was moved. Raises InputError for a run that
    is not trained to its end (its training would be over), or on another catalogue.
    """
    run = runs.read_run(workdir)
    with runs.alone(workdir):
        device_mesh = mesh.make_mesh()
        run = runs.on_devices_here(run, device_mesh, path)
        with jax.set_mesh(device_mesh):
            return _test(run, open_catalog(run.config.data), device_mesh)


def _test(run: runs.Run, catalog: Catalog, device_mesh: jax.sharding.Mesh) -> dict[str, Any]:
    config = run.config
    runs.check_data(run, catalog, "evaluate on the catalogue it was trained on (--path)")
    setup, state = runs.restore_finished(run, device_mesh)
    with_post_hoc = run.shape.num_classes <= config.eval.analysis_up_to_classes
    recognize = evaluate.make_recognize(
        config, setup.visual_graphdef, run.shape.num_classes, with_post_hoc=with_post_hoc
    )
    predictions = evaluate.predict(
        recognize,
        state,
        catalog.splits["test"],
        config,
        device_mesh,
        max_photos=config.eval.max_photos,
        keep_embedding=run.shape.num_classes <= config.eval.analysis_up_to_classes,
    )
    boundary, on_validation = evaluate.head_boundary(catalog, config), {}
    if with_post_hoc and len(validation := catalog.splits["validation"]):
        seen = evaluate.predict(
            recognize, state, validation, config, device_mesh, max_photos=config.eval.max_photos
        )
        on_validation = evaluate.post_hoc_accuracy(seen, catalog, config)
    info = {
        "post_hoc_on_validation": on_validation,
        "catalog": findings.catalogue_facts(catalog, boundary),
        "swallowed": findings.swallowed(
            predictions.label,
            predictions.top_classes[:, 0],
            catalog.classes.counts["train"],
            boundary,
            catalog.classes.sku,
        ),
        "attention": findings.attention(setup, state, catalog) if config.loss.with_semantic else {},
        "step": int(state.step),
        "step_of_end": setup.steps,
        "when": runs.now(),
        "commit": runs.commit(),
        "version": __version__,
        "hardware": runs.hardware(device_mesh),
    }
    return evaluate.write_results(
        run.workdir, predictions, catalog, config, split="test", info=info
    )


class _Signals:
    """SIGTERM and SIGINT set a flag that the loop reads between steps; a second SIGINT interrupts
    at once.
    """

    def __enter__(self):
        self.received: int | None = None
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        with contextlib.suppress(OSError):  # the terminal may be gone
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step, then saving; Ctrl-C stops at once\n")

    def __exit__(self, *exception):
        for number, handler in self.old.items():
            signal.signal(number, handler)


class _Loop:
    """One run: restore or start, step, log, validate, save."""

    def __init__(self, setup: Setup, catalog: Catalog, workdir: Path):
        self.setup, self.catalog, self.workdir = setup, catalog, workdir
        self.config = setup.config
        self.memory_plan = plan.make_plan(
            setup.config, setup.shape, devices=setup.mesh.size, platform=jax.default_backend()
        )
        with distributed.sync_errors():
            self.make_batches = train_batch_loader(
                catalog, setup.config, device_batches.process_shard()
            )
        triplets = self.make_batches.triplets
        self.triplets_digest = triplets.digest if triplets else ""
        if triplets:
            distributed.print_primary(f"triplets: {triplets.summary()}")
            distributed.check_same_on_all(
                "what can be drawn of data.triplets",
                self.triplets_digest,
                "give every process the same photos",
            )
        self.train_steps: dict[int, jax.stages.Compiled] = {}  # by batch size
        self.checkpoints = Checkpoints(workdir, num_classes=setup.shape.num_classes, writer=True)
        self.best = (self.checkpoints.info("best") or {}).get("validation")

    def run(self) -> None:
        setup, config = self.setup, self.config
        try:
            self._describe()
            first = self.checkpoints.latest_step() or 0
            self._compile(setup.plan.sizes(first, setup.steps))
            target = abstract_state(setup)
            validate = False
            if self.checkpoints.latest_step() is None:
                state = self._start()
            else:
                state = self.checkpoints.resume(target)
                info = self.checkpoints.info("last") or {}
                validate = info.get("validate", False)
                if info.get("triplets", "") != self.triplets_digest:
                    raise InputError(
                        f"{self.config.data.queries or self.config.data.path}: not the query photos that {self.workdir} began "
                        "with; give back what is gone, or use another --workdir"
                    )
                distributed.print_primary(f"resuming {self.workdir} from step {int(state.step)}")
            step = int(state.step)
            self.log = RunLog(
                self.workdir,
                start_step=step,
                total_steps=setup.steps,
                photos_before=setup.plan.first_position,
                tensorboard=config.train.tensorboard,
            )
            try:
                if validate:  # a signal came before its validation
                    self._validate(state, step)
                if step < setup.steps:
                    self._steps(state)
            finally:
                self.log.close()
        finally:
            self.checkpoints.wait()
            self.checkpoints.close()

    def _describe(self) -> None:
        catalog, setup = self.catalog, self.setup
        boundary = evaluate.head_boundary(catalog, self.config)
        counts = catalog.classes.counts["train"]
        head = int(head_mask(counts, boundary).sum())
        first, last = setup.plan.size(0), setup.plan.size(setup.steps - 1)
        photos = first if first == last else f"{first} to {last}"
        sizes = ", ".join(f"{len(catalog.splits[split])} {split}" for split in SPLITS)
        distributed.print_primary(
            f"{self.workdir}: {catalog.name}, {setup.shape.num_classes} classes ({head} head: more than {boundary} photos), "
            f"{sizes} photos; {setup.steps} steps of {photos} on {runs.hardware(setup.mesh)}",
            *plan_report.memory_lines(self.memory_plan),
            *plan_report.ratio_lines(self.memory_plan),
        )

    def _compile(self, batch_sizes: Iterable[int]) -> None:
        """The steps for those sizes, before anything is allocated: a run that does not fit ends
        here.
        """
        distributed.print_primary("compiling the step")
        target = abstract_state(self.setup)
        try:
            with distributed.sync_errors():
                self.train_steps |= fit.compile_within_memory(
                    self.memory_plan, self.setup, target, batch_sizes
                )
        except fit.DoesNotFit as error:
            lines = (
                plan_report.memory_lines(error.plan),
                plan_report.alternative_lines(error.plan, error.others, error.memory),
            )
            distributed.print_primary(*itertools.chain(*lines))
            raise

    def _start(self) -> TrainState:
        prior = class_log_prior(self.catalog.classes.counts["train"], self.setup.mesh)
        state = initial_state(self.setup, mesh.shard_class_vector(prior, self.setup.mesh))
        if self.config.loss.with_semantic:
            state = set_word_vectors(state, self.catalog.word_vectors)
        if shared := num_word_columns(self.config, self.setup.shape):
            words = class_words(self.catalog, self.config, shared)
            state = dataclasses.replace(state, classifier=start_word_rows(state.classifier, words))
        if self.config.model.init_from:
            state = warm_start(state, self.setup, self.catalog)
        return state

    def _batches(self, start: int) -> Generator[HostBatch]:
        data = self.config.data
        return prefetch(
            self.make_batches, start, self.setup.steps, workers=data.workers, source=data.source
        )

    def _steps(self, state: TrainState) -> None:
        """Losses are read one step late, so that the device never waits; nothing is saved before
        its loss was read.
        """
        config, setup = self.config.train, self.setup
        first = int(state.step)
        # More where the newest checkpoint was damaged and this one is from before the batch grew.
        if missing := set(setup.plan.sizes(first, setup.steps)) - self.train_steps.keys():
            self._compile(missing)
        evaluate_every = max(1, round(config.evaluate_every_epochs * setup.steps_per_epoch))
        numbers = mesh.replicate_tree(setup.numbers(), setup.mesh)
        on_device = (
            device_batches.DevicePhotos(self.catalog, setup.mesh)
            if self.config.data.on_device
            else None
        )
        last_save, pending = time.monotonic(), None
        with _Signals() as signals, contextlib.closing(self._batches(first)) as batches:
            for step, batch in enumerate(batches, first + 1):
                placed = (
                    on_device(batch) if on_device else device_batches.to_device(batch, setup.mesh)
                )
                state, losses = self.train_steps[setup.plan.size(step - 1)](state, placed, numbers)
                if pending is not None:
                    self._read(*pending)
                pending = step, losses
                evaluating = step == setup.steps or setup.plan.crosses_multiple(step, evaluate_every)
                # Clocks and signals are each process's own; asking the others waits for the step.
                agreeing = not distributed.is_multiprocess() or evaluating or step % config.log_every_steps == 0
                stop = agreeing and distributed.any_process(signals.received is not None)
                due = agreeing and distributed.broadcast_from_primary(
                    time.monotonic() - last_save > config.checkpoint_every_seconds
                )
                due |= (
                    bool(config.checkpoint_every_steps)
                    and step % config.checkpoint_every_steps == 0
                )
                if evaluating or due or stop:
                    self._read(*pending)
                    pending = None
                    self.log.pause()
                    if evaluating and not stop:
                        self._validate(state, step)
                        evaluating = False
                        # A signal that came meanwhile is not left for the next time.
                        stop = distributed.any_process(signals.received is not None)
                    if due or stop or step == setup.steps:
                        self._check_state(state, step)
                        self.checkpoints.save(
                            state, step, info={"validate": evaluating, "triplets": self.triplets_digest}
                        )
                        last_save = time.monotonic()
                    self.log.resume_clock()
                if stop:
                    self.checkpoints.wait()
                    name = (
                        signal.Signals(signals.received).name
                        if signals.received
                        else "a signal to another process"
                    )
                    raise TrainingStopped(
                        f"{name}: saved at step {step}; the same command goes on from there"
                    )

    def _read(self, step: int, losses: dict[str, jax.Array]) -> None:
        """Fetch a step's losses, stop on one that is not finite, log now and then."""
        values = {name: float(value) for name, value in losses.items()}
        if not math.isfinite(values["total"]):
            self.log.numbers(step, "train", values)
            raise self._not_finite(
                f"loss is {values['total']} at step {step}, wanted a finite number"
            )
        if step % self.config.train.log_every_steps == 0 or step == self.setup.steps:
            self.log.progress(step, values)

    def _check_state(self, state: TrainState, step: int) -> None:
        """A step's loss speaks of the parameters before its update; what is saved is what came
        after it.
        """
        if not bool(
            _all_finite(
                (state.params, state.batch_stats, state.classifier.kernel, state.classifier.bias)
            )
        ):
            raise self._not_finite(f"parameters are not finite after step {step}")

    def _not_finite(self, what: str) -> NotFinite:
        kept = self.checkpoints.latest_step()
        last = (
            f"the last good checkpoint is of step {kept}" if kept else "no checkpoint was saved yet"
        )
        return NotFinite(
            f"{what}; {last}; lower optim.learning_rate or add optim.warmup_epochs and train in another --workdir"
        )

    def _validate(self, state: TrainState, step: int) -> None:
        """Accuracy on validation; a better top-1 than any before becomes the best checkpoint."""
        split = self.catalog.splits["validation"]
        if not len(split):
            return
        if not hasattr(self, "recognize"):
            self.recognize = evaluate.make_recognize(
                self.config, self.setup.visual_graphdef, self.setup.shape.num_classes
            )
        predictions = evaluate.predict(
            self.recognize,
            state,
            split,
            self.config,
            self.setup.mesh,
            max_photos=self.config.eval.max_photos,
        )
        result = evaluate.summarise(predictions, self.catalog, self.config)
        numbers = {
            f"{group}_{k}": row[k]
            for group, row in result.items()
            for k in ("top1", "top3")
            if row[k] is not None
        }
        numbers["log_prob"] = float(np.mean(predictions.label_log_prob))
        self.log.numbers(step, "validation", numbers)
        # A small validation set ties often: the higher log-probability of the right label decides
        # then.
        value = [numbers["overall_top1"], numbers["log_prob"]]
        better = self.best is None or value > self.best
        shares = "  ".join(
            f"{group} {result[group]['top1']:.2f}"
            for group in result
            if result[group]["top1"] is not None
        )
        self.log.message(
            f"epoch {self.setup.epoch_at(step):.2f}  validation top-1: {shares}{'  (best)' if better else ''}"
        )
        if better:
            self._check_state(state, step)
            self.checkpoints.save(state, step, kind="best", info={"validation": value})
            self.best = value


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
