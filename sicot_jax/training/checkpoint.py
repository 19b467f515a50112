"""Orbax checkpoints of a TrainState: the last ones and the best one, restored on any mesh.

A checkpoint is logical: it holds global arrays and the number of classes. Rows of the class weights
beyond that number are zero padding, whose size depends on the mesh; restoring onto another mesh
removes or adds such rows only. Every byte of it is covered by a checksum, since Orbax itself
restores a flipped bit of an array without a word.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sicot_jax.common.checksums import describe_damage, write_checksums
from sicot_jax.common.trees import path_name
from sicot_jax.errors import InputError
from sicot_jax.parallel import distributed

FORMAT = 1
KINDS = ("last", "best")
_KEPT = {"last": 2, "best": 1}  # of the last ones two: the newest may be damaged
_MAX_DIFFERENCES = 12  # between two models, in an error message
_PARTIAL = ".tmp"  # end of the name of a checkpoint that is being written
_barriers = itertools.count()  # the name of a barrier can be used once


class CheckpointError(InputError):
    """A checkpoint cannot be used; the message is one line."""


class Checkpoints:
    """The checkpoints of a run folder, `checkpoints/last` and `checkpoints/best`.

    Of the last ones two are kept, of the best one. A checkpoint gets its name, its step, when all
    of it and its checksums are written, and only then are older ones removed.

    Attributes:
      folders: kind -> its folder.
    """

    def __init__(self, workdir: Path, *, num_classes: int, writer: bool = False):
        """Opens the checkpoints.

        Args:
          workdir: the run folder.
          num_classes: C; checkpoints of another number are refused.
          writer: whether this is the run itself, which alone makes the folders and removes what an
            earlier process left half written.
        """
        self.num_classes = num_classes
        self.folders = {kind: (workdir / "checkpoints" / kind).absolute() for kind in KINDS}
        if writer and distributed.is_primary():
            for folder in self.folders.values():
                folder.mkdir(parents=True, exist_ok=True)
                for entry in folder.iterdir():
                    if _PARTIAL in entry.name or "orbax-checkpoint-tmp" in entry.name:
                        shutil.rmtree(entry, ignore_errors=True)
        self._alias = _Alias(workdir.absolute())
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                # Compressing takes the memory of the state once more and twice the time, and saves
                # 8 % of random float32 numbers.
                state=ocp.PyTreeCheckpointHandler(use_compression=False),
                info=ocp.JsonCheckpointHandler(),
            )
        )
        self._thread = ThreadPoolExecutor(1)
        self._unfinished: Future[None] | None = None
        self._verified: set[Path] = set()  # checkpoints whose checksums were right

    def steps(self, kind: str = "last") -> list[int]:
        """Lists the steps that were saved, in ascending order, after waiting for the newest.

        Args:
          kind: "last" or "best".

        Returns:
          Numbers of updates.
        """
        self.wait()
        folder = self.folders[kind]
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def latest_step(self, kind: str = "last") -> int | None:
        """Returns the newest step that was saved, after waiting for it.

        Args:
          kind: "last" or "best".

        Returns:
          Number of updates; None without a checkpoint.
        """
        return max(self.steps(kind), default=None)

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
        # The host holds a copy of the state that is being written: `latest_step` waits for it.
        latest = self.latest_step(kind)
        if kind == "last" and latest is not None and latest >= step:
            raise CheckpointError(
                f"{self.folders[kind]}: step {step} was not saved; step {latest} is there: move "
                "that one away, or use another --workdir"
            )
        info = {"format": FORMAT, "num_classes": self.num_classes, "step": step, **(info or {})}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_with_arrays(state)), info=ocp.args.JsonSave(info)
        )
        partial = self.folders[kind] / f"{step}{_PARTIAL}"
        self._checkpointer.save(self._alias(partial), args=arguments, force=True)
        self._unfinished = self._thread.submit(self._finish, partial, next(_barriers))

    def _finish(self, partial: Path, barrier: int) -> None:
        """Waits for a checkpoint, adds its checksums and gives it its name; removes older ones."""
        self._checkpointer.wait_until_finished()
        folder, step = partial.parent, partial.name.removesuffix(_PARTIAL)
        if distributed.is_primary():
            write_checksums(partial)
            shutil.rmtree(folder / step, ignore_errors=True)  # an earlier best of this step
            self._verified.discard(folder / step)
            partial.rename(folder / step)
            older = {entry.name for entry in folder.iterdir() if entry.name.isdecimal()} - {step}
            for name in sorted(older, key=int)[: len(older) + 1 - _KEPT[folder.name]]:
                shutil.rmtree(folder / name)
        # Not one of devices, which would get between the collectives of a training step.
        ocp.multihost.sync_global_processes(
            f"sicot checkpoint {barrier}", processes=set(range(jax.process_count()))
        )

    def info(self, kind: str) -> dict[str, Any] | None:
        """Reads what was saved with the newest readable checkpoint.

        Args:
          kind: "last" or "best".

        Returns:
          `info` of `save`, with "format", "num_classes" and "step"; None without a checkpoint.
        """
        return self._newest(kind, self._info)

    def _newest(self, kind: str, read: Callable[[Path], Any]) -> Any:
        """`read` of the newest checkpoint that is not damaged; None where there is none."""
        for step in reversed(self.steps(kind)):
            folder = self.folders[kind] / str(step)
            if self._is_intact(folder):
                return read(folder)
        return None

    def _is_intact(self, folder: Path) -> bool:
        # One process reads all of it, for all of them.
        damage = ""
        if folder not in self._verified and distributed.is_primary():
            damage = describe_damage(folder)
        if distributed.broadcast_from_primary(bool(damage)):
            distributed.print_primary(f"{folder}: damaged ({damage}), trying the one before")
            return False
        self._verified.add(folder)
        return True

    def _info(self, folder: Path) -> dict[str, Any]:
        restored = self._checkpointer.restore(
            self._alias(folder), args=ocp.args.Composite(info=ocp.args.JsonRestore())
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

        def read(folder: Path) -> Any:
            self._check_info(self._info(folder), folder.parent)
            return self._restore(folder, target, partial=partial)

        state = self._newest(kind, read)
        if state is None:
            steps = ", ".join(map(str, self.steps(kind)))
            content = f"only damaged checkpoints ({steps})" if steps else "no checkpoint"
            raise CheckpointError(
                f"{self.folders[kind]}: holds {content}; train again in another --workdir, or "
                "check --workdir"
            )
        return state

    def resume(self, target: Any) -> Any:
        """Reads the newest readable last checkpoint for a run that continues from it.

        Damaged checkpoints after it are renamed to `damaged-STEP`: no step is saved below an
        existing one, and they would count among the two to keep.

        Args:
          target: see `restore`.

        Returns:
          The state, on the devices.

        Raises:
          CheckpointError: as of `restore`.
        """
        state = self.restore(target)
        folder = self.folders["last"]
        later = [step for step in self.steps() if step > int(state.step)]
        for step in later if distributed.is_primary() else ():
            shutil.rmtree(folder / f"damaged-{step}", ignore_errors=True)  # of an earlier resume
            (folder / str(step)).rename(folder / f"damaged-{step}")
        distributed.barrier("damaged checkpoints are aside")
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

    def _restore(self, folder: Path, target: Any, *, partial: bool) -> Any:
        self._check_shapes(folder, target, partial=partial)
        parts = _with_arrays(target)
        arguments = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False
            ),
            parts,
        )
        restored = self._checkpointer.restore(
            self._alias(folder),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=parts, restore_args=arguments, partial_restore=partial
                )
            ),
        )
        return _filled(target, restored["state"])

    def _check_shapes(self, folder: Path, target: Any, *, partial: bool) -> None:
        """Leading axes of the classifier may differ where both hold all classes: rest is padding.

        The residual has a leading axis of devices: fewer take their part of it, more start with
        zeros.
        """
        metadata = self._checkpointer.metadata(self._alias(folder)).item_metadata
        stored = leaf_shapes(metadata["state"].tree)
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
            raise CheckpointError(f"{folder.parent}: another model: {faults}")

    def wait(self) -> None:
        """Waits until everything is written, and raises what the writing raised."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.result()

    def close(self) -> None:
        """Ends the threads that write, after what they are writing."""
        self._thread.shutdown()
        self._checkpointer.close()
        self._alias.close()


class _Alias:
    """Another name of a folder for Orbax, which takes the name of a checkpoint as a pattern.

    Orbax 0.12 finds the parts of a checkpoint by `glob`, its folder's path unescaped.
    """

    def __init__(self, folder: Path):
        """Makes a link to the folder where its path is a pattern.

        Args:
          folder: absolute path.
        """
        self._folder = folder
        self._link: Path | None = None
        if re.search(r"[*?\[]", str(folder)):
            self._link = Path(tempfile.mkdtemp(prefix="sicot-"), "run")
            self._link.symlink_to(folder)

    def __call__(self, path: Path) -> Path:
        """Returns the other name of a path in the folder."""
        return path if self._link is None else self._link / path.relative_to(self._folder)

    def close(self) -> None:
        """Removes the link."""
        if self._link is not None:
            self._link.unlink()
            self._link.parent.rmdir()


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
