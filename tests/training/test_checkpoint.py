"""Checkpoints: what is kept, damaged ones, restoring on another model or class count."""

import dataclasses
import shutil

import jax
import pytest
from helpers.finished_runs import tiny_run_config

from sicot_jax.catalog.open import open_catalog
from sicot_jax.training.checkpoint import CheckpointError, Checkpoints
from sicot_jax.training.restore import restore_params
from sicot_jax.training.run import mesh_of_config, read_run, start_or_resume
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import abstract_state


@dataclasses.dataclass
class SmallState:
    """The least that a checkpoint can hold."""

    step: jax.Array
    weight: jax.Array

    def __init__(self, step, weight):
        self.step, self.weight = step, weight


jax.tree_util.register_dataclass(SmallState, ["step", "weight"], [])


def shapes_of(state: SmallState) -> SmallState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def small_state(step: int) -> SmallState:
    return SmallState(jax.numpy.asarray(step), jax.numpy.full(3, step, float))


@pytest.fixture
def checkpoints(tmp_path):
    store = Checkpoints(tmp_path, num_classes=3, writer=True)
    yield store
    store.close()


@dataclasses.dataclass
class LargerState(SmallState):
    later: dict


jax.tree_util.register_dataclass(LargerState, ["step", "weight", "later"], [])


def test_parts_of_the_state_that_are_empty_may_be_missing_in_a_checkpoint(checkpoints):
    checkpoints.save(small_state(4), 4)
    target = shapes_of(small_state(0))
    restored = checkpoints.restore(LargerState(target.step, target.weight, {}))
    assert (int(restored.step), restored.weight.tolist(), restored.later) == (4, [4.0] * 3, {})
    with pytest.raises(CheckpointError, match="another model: later/x missing"):
        checkpoints.restore(LargerState(target.step, target.weight, {"x": target.weight}))


def test_a_step_that_is_not_saved_is_an_error(checkpoints):
    checkpoints.save(small_state(4), 4)
    for step in (2, 4):
        with pytest.raises(
            CheckpointError, match=rf"last: step {step} was not saved; step 4 is there: move"
        ):
            checkpoints.save(small_state(step), step)
    checkpoints.save(small_state(6), 6)  # also while the one before is still being written
    assert checkpoints.steps("last") == [4, 6]


def test_a_run_saves_after_a_damaged_checkpoint(checkpoints, tmp_path):
    """It is neither counted among the two to keep, nor in the way of the steps before it."""
    for step in (4, 8):
        checkpoints.save(small_state(step), step)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "last" / "8" / "state")
    target = shapes_of(small_state(0))
    for later in (6, 7):
        assert checkpoints.resume(target).step == {6: 4, 7: 6}[later]
        checkpoints.save(small_state(later), later)
    assert checkpoints.steps("last") == [6, 7]
    assert (tmp_path / "checkpoints" / "last" / "damaged-8").is_dir()


DAMAGES = {
    "missing": None,
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "first bit flipped": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "last bit flipped": lambda content: content[:-1] + bytes([content[-1] ^ 128]),
    "longer": lambda content: content + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_any_damaged_file_leads_to_the_checkpoint_before(checkpoints, tmp_path, capfd, damage):
    """Every file of a checkpoint, Orbax's own and that of the checksums."""
    for step in (4, 8):
        checkpoints.save(small_state(step), step)
    newest = tmp_path / "checkpoints" / "last" / "8"
    assert checkpoints.steps() == [4, 8]
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        path.write_bytes(damage(content)) if damage else path.unlink()
        reader = Checkpoints(tmp_path, num_classes=3)
        capfd.readouterr()
        restored = reader.restore(shapes_of(small_state(0)))
        assert (int(restored.step), restored.weight.tolist()) == (4, [4.0] * 3), path
        assert reader.info("last")["step"] == 4
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 2, lines  # one for each reading
        assert lines[0].startswith(f"{newest}: damaged ("), lines
        path.write_bytes(content)
        reader.close()
    assert Checkpoints(tmp_path, num_classes=3).restore(shapes_of(small_state(0))).step == 8


@pytest.mark.parametrize("name", ["a [2024]", "a*b?c", "a%41#b", "{a,b} 'c' \"d\""])
def test_a_run_folder_is_no_pattern(tmp_path, monkeypatch, name):
    """Orbax alone trains to the end in a folder with brackets, and keeps nothing."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(links))
    (tmp_path / "a 2" / "checkpoints" / "last").mkdir(parents=True)
    for writer in (True, False):
        checkpoints = Checkpoints(tmp_path / name, num_classes=3, writer=writer)
        if writer:
            checkpoints.save(small_state(4), 4)
        restored = checkpoints.restore(shapes_of(small_state(0)))
        assert (int(restored.step), restored.weight.tolist()) == (4, [4.0] * 3)
        checkpoints.close()
    assert (tmp_path / name / "checkpoints" / "last" / "4").is_dir()
    assert not list(links.iterdir())


def test_a_checkpoint_that_was_killed_while_it_was_written_is_none(checkpoints, tmp_path):
    """The older one is removed only when the new one has its name."""
    checkpoints.save(small_state(4), 4, kind="best")
    checkpoints.wait()
    folder = tmp_path / "checkpoints" / "best"
    before = {entry.name for entry in folder.iterdir()}
    shutil.copytree(folder / "4", folder / "8.tmp")
    assert (checkpoints.steps("best"), before) == ([4], {"4"})
    Checkpoints(tmp_path, num_classes=3, writer=True).close()
    assert {entry.name for entry in folder.iterdir()} == {"4"}


def test_a_new_best_checkpoint_replaces_one_of_a_later_step(checkpoints):
    for step in (8, 6, 6, 7):
        checkpoints.save(small_state(step), step, kind="best", info={"validation": step})
        assert checkpoints.steps("best") == [step]
        assert checkpoints.info("best")["validation"] == step


def test_half_written_checkpoints_are_removed_by_the_run_alone(tmp_path):
    """Another process may read while a checkpoint is being written."""
    left = tmp_path / "checkpoints" / "last" / "1.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    catalog = open_catalog(tiny_run_config().data)
    start_or_resume(tmp_path, tiny_run_config(), catalog)
    # No step was saved: any config may start.
    start_or_resume(tmp_path, tiny_run_config(steps=7), catalog)
    for writer in (False, True):
        checkpoints = Checkpoints(tmp_path, num_classes=3, writer=writer)
        # Waits for the removal, which goes on in the background.
        checkpoints.save(small_state(2 + writer), 2 + writer)
        checkpoints.wait()
        checkpoints.close()
        assert left.exists() is not writer


def test_restoring_another_model_names_every_difference(finished_run):
    workdir, config, _ = finished_run
    run = read_run(workdir)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, embedding_width=24))
    device_mesh = mesh_of_config(config)
    with jax.set_mesh(device_mesh):
        setup = make_setup(wider, run.shape, device_mesh)
        checkpoints = Checkpoints(workdir, num_classes=run.shape.num_classes)
        with pytest.raises(
            CheckpointError,
            match=r"classifier/weights/kernel is \(11, 16\), wanted \(11, 24\).*"
            "params/visual/projection",
        ):
            checkpoints.restore(abstract_state(setup))
        checkpoints.close()


def test_restoring_another_class_count_is_refused(finished_run):
    workdir, _, _ = finished_run
    checkpoints = Checkpoints(workdir, num_classes=12)
    with pytest.raises(CheckpointError, match=r"num_classes=11, the catalogue has 12"):
        checkpoints.restore(None)
    checkpoints.close()


def test_files_of_a_file_browser_are_no_damage(checkpoints, tmp_path):
    for step in (4, 8):
        checkpoints.save(small_state(step), step)
    newest = tmp_path / "checkpoints" / "last" / "8"
    checkpoints.wait()
    (newest / ".DS_Store").touch()
    assert Checkpoints(tmp_path, num_classes=3).restore(shapes_of(small_state(0))).step == 8
    (newest / "more").touch()
    assert Checkpoints(tmp_path, num_classes=3).restore(shapes_of(small_state(0))).step == 4


def test_a_damaged_best_checkpoint_leads_to_the_last_one(finished_run, tmp_path, capfd):
    workdir = shutil.copytree(finished_run[0], tmp_path / "run")
    best = workdir / "checkpoints" / "best"
    run = read_run(workdir)
    device_mesh = mesh_of_config(run.config)
    next(path for path in best.rglob("*") if path.is_file() and path.stat().st_size).write_bytes(
        b""
    )
    with jax.set_mesh(device_mesh):
        restored = restore_params(run, device_mesh)
    assert restored.step == restored.trained_steps == 6
    assert "damaged (" in capfd.readouterr().err
