"""Orbax checkpoints of a TrainState: the last one and the best one, restored on any mesh.

A checkpoint is logical: it holds global arrays and the class count. Rows of the classifier beyond
  the class count are zero padding, whose number depends on the mesh; restoring onto another mesh
  cuts or adds such rows only.
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
_NAMED = 12  # differences between two models that an error message names
_DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
)  # what Orbax raises on missing, cut or unreadable files


class CheckpointError(InputError):
    """A checkpoint that cannot be used here; the message is one line."""


class Checkpoints:
    """`workdir/checkpoints/last` (the newest two: one may be half written when the machine dies)
    and `best` (one).

    `writer`: the run itself, which alone may clear away what an earlier process left half written.
    """

    def __init__(self, workdir: Path, *, num_classes: int, writer: bool = False):
        self.num_classes = num_classes
        self.managers = {
            kind: ocp.CheckpointManager(
                (workdir / "checkpoints" / kind).absolute(),
                # Compressing takes as much memory as the state once more and twice the time, for 8
                # % of random float32 numbers.
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
        return self.managers[kind].latest_step()

    def save(
        self, state: Any, step: int, *, kind: str = "last", info: dict[str, Any] | None = None
    ) -> None:
        """Start writing behind the caller, who may go on with steps that donate the arrays: they
        are copied where need be.

        A new best one replaces the old one whatever its step: a run that resumed before its best
          may find another. Raises CheckpointError where a last one of this or a later step lies
          there.
        """
        self.wait()  # a host's memory holds copies of what is being written: one state at a time
        manager = self.managers[kind]
        if kind == "best":
            for old in (old for old in manager.all_steps() if old >= step):
                manager.delete(old)
        info = {"format": FORMAT, "num_classes": self.num_classes, "step": step, **(info or {})}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_with_arrays(state)), info=ocp.args.JsonSave(info)
        )
        if not manager.save(step, args=arguments):
            raise CheckpointError(
                f"{manager.directory}: step {step} was not saved, step {manager.latest_step()} lies there; "
                "move that one away, or use another --workdir"
            )

    def info(self, kind: str) -> dict[str, Any] | None:
        """What was saved beside the newest readable state of that kind, or None."""
        return self._newest(kind, lambda step: self._info(kind, step))

    def _newest(self, kind: str, read: Callable[[int], Any]) -> Any:
        """`read` of the newest step, passing over damaged ones with a line that says so; None where
        none is left.
        """
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
        """The newest readable state of that kind in the shapes and shardings of `target`
        (ShapeDtypeStructs).

        `partial`: what `target` lacks is not read, such as an optimizer's state. Raises
        CheckpointError when there is none, or when it is of another class count, shape or
        structure.
        """
        manager = self.managers[kind]

        def read(step):
            self._check_info(self._info(kind, step), manager.directory)
            return self._restore(manager, step, target, partial=partial)

        state = self._newest(kind, read)
        if state is None:
            steps = ", ".join(map(str, sorted(manager.all_steps())))
            found = f"only damaged checkpoints ({steps})" if steps else "no checkpoint"
            raise CheckpointError(
                f"{manager.directory}: holds {found}; train again in another --workdir, or check --workdir"
            )
        return state

    def resume(self, target: Any) -> Any:
        """`restore` of the last state for a run that goes on from it.

        Damaged ones after it become `damaged-STEP`: Orbax saves no step below one that lies there,
        and would count them among the two to keep.
        """
        state = self.restore(target)
        manager = self.managers["last"]
        folder = Path(manager.directory)
        for step in (
            step for step in manager.all_steps() if step > int(state.step) and distributed.is_primary()
        ):
            shutil.rmtree(folder / f"damaged-{step}", ignore_errors=True)  # of an earlier time
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
                f"{directory}: num_classes={info['num_classes']}, the catalogue has {self.num_classes}; "
                "use another --workdir, or model.init_from to start from it"
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

    def _check_shapes(self, manager, step: int, target: Any, *, partial: bool) -> None:
        """Leading axes of the classifier may differ where both hold all classes: the rest is
        padding.

        What devices have not sent yet has a leading axis of devices: fewer take their part of it,
          more start with zeros.
        """
        stored, wanted = shapes(manager.item_metadata(step)["state"].tree), shapes(target)
        if partial:
            stored = {name: shape for name, shape in stored.items() if name in wanted}
        for name in stored.keys() & wanted.keys():
            have, want = stored[name], wanted[name]
            padded = (
                have[1:] == want[1:] and have and want and min(have[0], want[0]) >= self.num_classes
            )
            if padded and name.startswith("classifier"):
                stored[name] = want
            if name.startswith("unsent") and have[1:] == want[1:]:
                stored[name] = want
        if faults := differences(stored, wanted):
            raise CheckpointError(f"{manager.directory}: another model: {faults}")

    def wait(self) -> None:
        for manager in self.managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        for manager in self.managers.values():
            manager.close()


def _with_arrays(state: Any) -> dict[str, Any]:
    """The fields of a state that hold arrays, of states in it likewise: what is not used in a run
    is not in its checkpoints.
    """
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    held = {name: value for name, value in fields.items() if jax.tree.leaves(value)}
    return {name: _with_arrays(v) if dataclasses.is_dataclass(v) else v for name, v in held.items()}


def _filled(state: Any, arrays: Mapping[str, Any]) -> Any:
    """The state with `arrays` as `_with_arrays` had them."""
    inside = {name: getattr(state, name) for name in arrays}
    found = {
        name: _filled(inside[name], value)
        if dataclasses.is_dataclass(inside[name]) and isinstance(value, Mapping)
        else value
        for name, value in arrays.items()
    }
    return dataclasses.replace(state, **found)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path name of each array -> its shape."""
    return {
        path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def differences(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> str:
    """How two `shapes` differ, the first of many; "" where they are equal."""
    faults = [f"{name} missing" for name in wanted.keys() - stored.keys()]
    faults += [f"{name} unexpected" for name in stored.keys() - wanted.keys()]
    both = stored.keys() & wanted.keys()
    faults += [
        f"{name} is {stored[name]}, wanted {wanted[name]}"
        for name in both
        if stored[name] != wanted[name]
    ]
    faults.sort(
        key=lambda fault: ("opt_state" in fault, fault)
    )  # optimizers only repeat their parameters
    more = [f"and {len(faults) - _NAMED} more"] if len(faults) > _NAMED else []
    return "; ".join(faults[:_NAMED] + more)
