"""Orbax checkpoints of a TrainState: the last one and the best one, restored on any mesh.

A checkpoint is logical: it holds global arrays and the class count. Rows of the classifier beyond the class count are
zero padding, whose number depends on the mesh; restoring onto another mesh cuts or adds such rows only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sicot_jax.errors import InputError

FORMAT = 1
KINDS = ("last", "best")
_DAMAGED = (OSError, ValueError, KeyError, AttributeError)  # what Orbax raises on missing, cut or unreadable files


class CheckpointError(InputError):
    """A checkpoint that cannot be used here; the message is one line."""


class Checkpoints:
    """`workdir/checkpoints/last` (the newest two: one may be half written when the machine dies) and `best` (one)."""

    def __init__(self, workdir: Path, *, num_classes: int):
        self.num_classes = num_classes
        self.managers = {
            kind: ocp.CheckpointManager(
                (workdir / "checkpoints" / kind).absolute(),
                item_handlers={"state": ocp.PyTreeCheckpointHandler(), "info": ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(max_to_keep=2 if kind == "last" else 1, create=True),
            )
            for kind in KINDS
        }

    def latest_step(self, kind: str = "last") -> int | None:
        return self.managers[kind].latest_step()

    def save(self, state: Any, step: int, *, kind: str = "last", info: dict[str, Any] | None = None) -> None:
        """Start writing; the arrays are copied before this returns, the rest goes on behind."""
        if self.managers[kind].latest_step() == step:
            return
        info = {"format": FORMAT, "num_classes": self.num_classes, "step": step, **(info or {})}
        self.managers[kind].save(
            step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), info=ocp.args.JsonSave(info))
        )

    def info(self, kind: str) -> dict[str, Any] | None:
        """What was saved beside the newest readable state of that kind, or None."""
        for step in sorted(self.managers[kind].all_steps(), reverse=True):
            try:
                return self._info(kind, step)
            except _DAMAGED:
                continue
        return None

    def _info(self, kind: str, step: int) -> dict[str, Any]:
        restored = self.managers[kind].restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))
        return dict(restored["info"])

    def restore(self, target: Any, kind: str = "last") -> Any:
        """The newest state of that kind in the shapes and shardings of `target` (ShapeDtypeStructs with shardings).

        A damaged one is passed over with a line that says so. Raises CheckpointError when none is left, or when the
        newest is of another class count, shape or structure.
        """
        manager = self.managers[kind]
        steps = sorted(manager.all_steps(), reverse=True)
        for step in steps:
            try:
                self._check_info(self._info(kind, step), manager.directory)
                return self._restore(manager, step, target)
            except CheckpointError:
                raise
            except _DAMAGED as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                print(f"{manager.directory / str(step)}: damaged ({reason}), trying the one before", file=sys.stderr)
        found = f"only damaged checkpoints ({', '.join(map(str, steps))})" if steps else "no checkpoint"
        raise CheckpointError(
            f"{manager.directory}: holds {found}; train again in another --workdir, or check --workdir"
        )

    def _check_info(self, info: dict[str, Any], directory: Any) -> None:
        if info["format"] != FORMAT:
            raise CheckpointError(f"{directory}: format {info['format']}, this version reads {FORMAT}")
        if info["num_classes"] != self.num_classes:
            raise CheckpointError(
                f"{directory}: num_classes={info['num_classes']}, the catalogue has {self.num_classes}; "
                "use another --workdir, or model.init_from to start from it"
            )

    def _restore(self, manager: ocp.CheckpointManager, step: int, target: Any) -> Any:
        self._check_shapes(manager, step, target)
        arguments = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False
            ),
            target,
        )
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(item=target, restore_args=arguments))
        )
        return restored["state"]

    def _check_shapes(self, manager, step: int, target: Any) -> None:
        """Every difference at once. Leading axes may differ where both hold all classes: the rest is padding."""
        stored = _shapes(manager.item_metadata(step)["state"].tree)
        wanted = _shapes(target)
        faults = [f"{name} missing" for name in wanted.keys() - stored.keys()]
        faults += [f"{name} unexpected" for name in stored.keys() - wanted.keys()]
        for name in wanted.keys() & stored.keys():
            have, want = stored[name], wanted[name]
            padded = have[1:] == want[1:] and have and want and min(have[0], want[0]) >= self.num_classes
            if have != want and not (padded and name.startswith("classifier")):
                faults.append(f"{name} is {have}, wanted {want}")
        if faults:
            raise CheckpointError(f"{manager.directory}: another model: {'; '.join(sorted(faults))}")

    def wait(self) -> None:
        for manager in self.managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        for manager in self.managers.values():
            manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    from sicot_jax.optim import path_name

    return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
