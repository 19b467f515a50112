"""Orbax checkpoints of a TrainState: the last ones and the best one, restored on any mesh.

A checkpoint is logical: it holds global arrays and the number of classes. Rows of the class weights
beyond that number are zero padding, whose size depends on the mesh; restoring onto another mesh
removes or adds such rows only.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sicot_jax.common.trees import path_name
from sicot_jax.errors import InputError
from sicot_jax.parallel import distributed

FORMAT = 1
KINDS = ("last", "best")
_MAX_DIFFERENCES = 12  # between two models, in an error message
# What Orbax raises on missing, truncated or unreadable files.
_DAMAGED = (OSError, ValueError, KeyError, AttributeError)


class CheckpointError(InputError):
    """A checkpoint cannot be used; the message is one line."""


class Checkpoints:
    """The checkpoints of a run folder, `checkpoints/last` and `checkpoints/best`.

    Of the last ones two are kept (one may be half written when the machine dies), of the best one.
    """

    def __init__(self, workdir: Path, *, num_classes: int, writer: bool = False):
        """Opens the checkpoints; creates the folders where there are none.

        Args:
          workdir: the run folder.
          num_classes: C; checkpoints of another number are refused.
          writer: whether this is the run itself, which alone may remove what an earlier process
            left half written.
        """
        self.num_classes = num_classes
        self.managers = {
            kind: ocp.CheckpointManager(
                (workdir / "checkpoints" / kind).absolute(),
                # Compressing takes the memory of the state once more and twice the time, and saves
                # 8 % of random float32 numbers.
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                    "info": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2 if kind == "last" else 1,
                    create=True,
                    cleanup_tmp_directories=writer,
                ),
            )
            for kind in KINDS
        }

    def latest_step(self, kind: str = "last") -> int | None:
        """Returns the newest step that was saved.

        Args:
          kind: "last" or "best".

        Returns:
          Number of updates; None without a checkpoint.
        """
        return self.managers[kind].latest_step()

    def save(
        self, state: Any, step: int, *, kind: str = "last", info: dict[str, Any] | None = None
    ) -> None:
        """Starts writing a checkpoint in the background.

        The caller may go on with steps that donate the arrays: they are copied where need be. A new
        best checkpoint replaces the old one whatever its step: a run that resumed from before its
        best may have another.

        Args:
          state: a dataclass of arrays.
          step: updates done.
          kind: "last" or "best".
          info: what is kept with it, a tree that JSON can hold.

        Raises:
          CheckpointError: there is a last checkpoint of this or a later step.
        """
        self.wait()  # the host holds a copy of the state that is being written: one at a time
        manager = self.managers[kind]
        if kind == "best":
            for later in [other for other in manager.all_steps() if other >= step]:
                manager.delete(later)
        info = {"format": FORMAT, "num_classes": self.num_classes, "step": step, **(info or {})}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_with_arrays(state)), info=ocp.args.JsonSave(info)
        )
        if not manager.save(step, args=arguments):
            raise CheckpointError(
                f"{manager.directory}: step {step} was not saved; step {manager.latest_step()} is "
                "there: move that one away, or use another --workdir"
            )

    def info(self, kind: str) -> dict[str, Any] | None:
        """Reads what was saved with the newest readable checkpoint.

        Args:
          kind: "last" or "best".

        Returns:
          `info` of `save`, with "format", "num_classes" and "step"; None without a checkpoint.
        """
        return self._newest(kind, lambda step: self._info(kind, step))

    def _newest(self, kind: str, read: Callable[[int], Any]) -> Any:
        """`read` of the newest step that is not damaged; None where there is none."""
        manager = self.managers[kind]
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                return read(step)
            except CheckpointError:
                raise
            except _DAMAGED as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                distributed.print_primary(
                    f"{manager.directory / str(step)}: damaged ({reason}), trying the one before"
                )
        return None

    def _info(self, kind: str, step: int) -> dict[str, Any]:
        restored = self.managers[kind].restore(
            step, args=ocp.args.Composite(info=ocp.args.JsonRestore())
        )
        return dict(restored["info"])

    def restore(self, target: Any, kind: str = "last", *, partial: bool = False) -> Any:
        """Reads the newest readable checkpoint.

        Args:
          target: the state with a ShapeDtypeStruct, sharding included, for every array.
          kind: "last" or "best".
          partial: whether the checkpoint may hold more than `target`, such as an optimizer state;
            the rest is not read.

        Returns:
          The state, on the devices.

        Raises:
          CheckpointError: there is none, or it is of another number of classes, shape or structure.
        """
        manager = self.managers[kind]

        def read(step: int) -> Any:
            self._check_info(self._info(kind, step), manager.directory)
            return self._restore(manager, step, target, partial=partial)

        state = self._newest(kind, read)
        if state is None:
            steps = ", ".join(map(str, sorted(manager.all_steps())))
            content = f"only damaged checkpoints ({steps})" if steps else "no checkpoint"
            raise CheckpointError(
                f"{manager.directory}: holds {content}; train again in another --workdir, or check "
                "--workdir"
            )
        return state

    def resume(self, target: Any) -> Any:
        """Reads the newest readable last checkpoint for a run that continues from it.

        Damaged checkpoints after it are renamed to `damaged-STEP`: Orbax saves no step below an
        existing one, and would count them among the two to keep.

        Args:
          target: see `restore`.

        Returns:
          The state, on the devices.

        Raises:
          CheckpointError: as of `restore`.
        """
        state = self.restore(target)
        manager = self.managers["last"]
        folder = Path(manager.directory)
        for step in (
            step
            for step in manager.all_steps()
            if step > int(state.step) and distributed.is_primary()
        ):
            shutil.rmtree(folder / f"damaged-{step}", ignore_errors=True)  # of an earlier resume
            (folder / str(step)).rename(folder / f"damaged-{step}")
        distributed.barrier("damaged checkpoints are aside")
        manager.reload()
        return state

    def _check_info(self, info: dict[str, Any], directory: Any) -> None:
        if info["format"] != FORMAT:
            raise CheckpointError(
                f"{directory}: format {info['format']}, this version reads {FORMAT}"
            )
        if info["num_classes"] != self.num_classes:
            raise CheckpointError(
                f"{directory}: num_classes={info['num_classes']}, the catalogue has "
                f"{self.num_classes}; use another --workdir, or model.init_from to start from it"
            )

    def _restore(
        self, manager: ocp.CheckpointManager, step: int, target: Any, *, partial: bool
    ) -> Any:
        self._check_shapes(manager, step, target, partial=partial)
        parts = _with_arrays(target)
        arguments = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False
            ),
            parts,
        )
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=parts, restore_args=arguments, partial_restore=partial
                )
            ),
        )
        return _filled(target, restored["state"])

    def _check_shapes(
        self, manager: ocp.CheckpointManager, step: int, target: Any, *, partial: bool
    ) -> None:
        """Leading axes of the classifier may differ where both hold all classes: rest is padding.

        The residual has a leading axis of devices: fewer take their part of it, more start with
        zeros.
        """
        stored = leaf_shapes(manager.item_metadata(step)["state"].tree)
        wanted = leaf_shapes(target)
        if partial:
            stored = {name: shape for name, shape in stored.items() if name in wanted}
        for name in stored.keys() & wanted.keys():
            have, want = stored[name], wanted[name]
            if not have or not want or have[1:] != want[1:]:
                continue
            is_padded = min(have[0], want[0]) >= self.num_classes
            if (name.startswith("classifier") and is_padded) or name.startswith("residual"):
                stored[name] = want
        if faults := describe_differences(stored, wanted):
            raise CheckpointError(f"{manager.directory}: another model: {faults}")

    def wait(self) -> None:
        """Waits until everything is written."""
        for manager in self.managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        """Closes the Orbax managers."""
        for manager in self.managers.values():
            manager.close()


def _with_arrays(state: Any) -> dict[str, Any]:
    """The fields of a state that hold arrays, nested: what a run does not use is not saved."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    held = {name: value for name, value in fields.items() if jax.tree.leaves(value)}
    return {name: _with_arrays(v) if dataclasses.is_dataclass(v) else v for name, v in held.items()}


def _filled(state: Any, arrays: Mapping[str, Any]) -> Any:
    """The state with `arrays`, which are nested as those of `_with_arrays`."""
    fields = {name: getattr(state, name) for name in arrays}
    values = {
        name: _filled(fields[name], value)
        if dataclasses.is_dataclass(fields[name]) and isinstance(value, Mapping)
        else value
        for name, value in arrays.items()
    }
    return dataclasses.replace(state, **values)


def leaf_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a tree's arrays.

    Args:
      tree: tree of arrays, or of other objects with a shape.

    Returns:
      Path name of each array -> its shape.
    """
    return {
        path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe_differences(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> str:
    """Returns how the shapes of two trees differ, in one line.

    Args:
      stored: shapes from `leaf_shapes`.
      wanted: likewise.

    Returns:
      The first of the differences; "" where there is none.
    """
    faults = [f"{name} missing" for name in wanted.keys() - stored.keys()]
    faults += [f"{name} unexpected" for name in stored.keys() - wanted.keys()]
    faults += [
        f"{name} is {stored[name]}, wanted {wanted[name]}"
        for name in stored.keys() & wanted.keys()
        if stored[name] != wanted[name]
    ]
    # Optimizer states only repeat their parameters.
    faults.sort(key=lambda fault: ("opt_state" in fault, fault))
    rest = len(faults) - _MAX_DIFFERENCES
    return "; ".join(faults[:_MAX_DIFFERENCES] + ([f"and {rest} more"] if rest > 0 else []))
