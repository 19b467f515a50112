"""Hand-written run folders for the tests of reports: four classes, eight test photos."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from sicot_jax import config as config_lib
from sicot_jax.config import Config
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.metrics import accuracy
from sicot_jax.training.run import mesh_of_config, read_run
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import abstract_state

# Class 0 is head, 1 and 2 are tail; class 3 is tail and has neither training nor test photos.
COUNTS = np.array([9, 3, 1, 0])
LABEL = np.array([0, 0, 0, 0, 1, 1, 2, 2])
FIRST = [0, 0, 1, 1, 1, 0, 0, 0]  # best class of each photo: 2 of 4, 1 of 2, 0 of 2 right
SECOND = [0, 0, 0, 1, 1, 1, 2, 0]  # 3 of 4, 2 of 2, 1 of 2
NO_TEXT = {"mixed": 0.0}
ADJUSTMENT_NAMES = [f"logit_adjustment_{tau:g}" for tau in np.arange(-1, 1.75, 0.25)]
ADJUSTMENT_NAMES += [f"tau_norm_{tau:g}" for tau in (0.25, 0.5, 0.75, 1.0)]


def make_run(
    workdir,
    best,
    *,
    order=None,
    hashes=(),
    boundary=5,
    validation=(10.0, 20.0, 20.1),
    post_hoc=None,
    results=(),
    **config,
):
    """Writes a run folder in which photo i is predicted as class best[i].

    Args:
      workdir: folder to make.
      best: int [8], predicted class of each photo.
      order: int [8], order in which the photos are stored.
      hashes: entries of the results' hashes.
      boundary: head boundary.
      validation: validation top-1 in %, evenly through the run.
      post_hoc: post-hoc adjustment -> predicted classes, int [8].
      results: further entries of the results.
      config: sections of the config.

    Returns:
      The folder.
    """
    order = np.arange(len(LABEL)) if order is None else order
    best = np.asarray(best)
    rest = [[c for c in (3, 2, 1, 0) if c != b] for b in best]
    top = np.concatenate([best[:, None], rest], 1) if len(best) else np.zeros((0, 4), int)
    workdir.mkdir(parents=True)
    np.savez(
        workdir / "predictions.npz",
        image_id=np.array([f"photo {i}" for i in range(len(LABEL))], str)[order],
        label=LABEL[order],
        top_classes=top[order],
        train_counts=COUNTS,
        **(
            {
                "post_hoc": np.array(list(post_hoc.values())).T[order],
                "post_hoc_names": list(post_hoc),
            }
            if post_hoc
            else {}
        ),
    )
    results = {
        "accuracy": accuracy(LABEL, top, COUNTS, boundary),
        "head_boundary": boundary,
        "hashes": {"data": "d" * 64, "class_table": "c" * 64, "test_set": "t" * 64, **dict(hashes)},
        "step": 30,
        "step_of_end": 40,
        "commit": "",
        "hardware": "1 x cpu",
        **dict(results),
    }
    (workdir / "results.json").write_text(json.dumps(results))
    (workdir / "config.json").write_text(json.dumps({"format": 1, "config": {"seed": 3} | config}))
    lines = [{"step": 10, "kind": "train", "total": 1.0}]
    steps = np.linspace(40 / len(validation), 40, len(validation)) if validation else []
    lines += [
        {"step": float(s), "kind": "validation", "overall_top1": v}
        for s, v in zip(steps, validation, strict=True)
    ]
    (workdir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def cells(table):
    """Returns the rows of Markdown tables: first cell -> the other cells."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def make_seeds(folder, guesses, **config):
    """Writes a run folder per seed, named as in a sweep."""
    return [
        make_run(folder / f"seed_{seed}", best, seed=seed, **config)
        for seed, best in enumerate(guesses)
    ]


def every_adjustment(best, **others):
    return {name: others.get(name, best) for name in ADJUSTMENT_NAMES}


ROOT = Path(__file__).parents[2]


def tiny_run_config(**train_options) -> Config:
    config = config_lib.load_config("tiny", ["--config.mesh.data=1"])
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train_options))


def with_mesh(config: Config, data: int, model: int) -> Config:
    return dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=data, model=model)
    )


def last_state(workdir: Path, config: Config):
    """The last checkpoint as numpy, padding rows cut."""
    run = read_run(workdir)
    device_mesh = mesh_of_config(config)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, run.shape, device_mesh)
        checkpoints = Checkpoints(workdir, num_classes=run.shape.num_classes)
        state = checkpoints.restore(abstract_state(setup))
        checkpoints.close()
        return jax.device_get(state)


def die_at(monkeypatch, step: int):
    """The process 'dies' (an exception nobody expects) when that step's batch is transferred."""
    from sicot_jax.training import device_batches

    original = device_batches.to_device
    calls = {"n": 0}

    def dying(batch, mesh):
        if "token_ids" in batch:
            calls["n"] += 1
            if calls["n"] == step:
                raise ZeroDivisionError("killed")
        return original(batch, mesh)

    monkeypatch.setattr(device_batches, "to_device", dying)
