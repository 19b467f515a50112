"""Evaluates a finished run on the test split and writes its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from sicot_jax._version import __version__
from sicot_jax.catalog.catalog import Catalog
from sicot_jax.catalog.open import open_catalog
from sicot_jax.parallel import mesh
from sicot_jax.training.error_analysis import (
    catalog_statistics,
    tail_to_head_confusions,
    title_attention,
)
from sicot_jax.training.predict import make_predict_step, predict_split, visual_weights
from sicot_jax.training.provenance import code_commit, hardware_name, utc_now
from sicot_jax.training.restore import restore_params
from sicot_jax.training.results import head_boundary, post_hoc_accuracy, write_results
from sicot_jax.training.run import (
    Run,
    check_catalog_of_run,
    fit_run_to_devices,
    read_run,
    run_lock,
    with_words_of,
)


def evaluate_run(workdir: Path, *, catalog_path: str = "") -> dict[str, Any]:
    """Evaluates a finished run's best checkpoint on the test split, on all devices of this process.

    Writes `results.json` and `predictions.npz` to the run folder.

    Args:
      workdir: the run folder.
      catalog_path: new path of the run's catalogue, if it was moved.

    Returns:
      What `results.json` holds.

    Raises:
      InputError: the run is not trained to its end, or the catalogue is another one.
    """
    run = read_run(workdir)
    with run_lock(workdir):
        device_mesh = mesh.make_mesh()
        run = fit_run_to_devices(run, device_mesh, catalog_path=catalog_path)
        with jax.set_mesh(device_mesh):
            return evaluate_locked_run(run, open_catalog(run.config.data), device_mesh)


def evaluate_locked_run(
    run: Run, catalog: Catalog, device_mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Evaluates a finished run whose folder is locked, as `evaluate_run`.

    Args:
      run: the run; its evaluation batches can be divided by these devices.
      catalog: catalogue that it was trained on.
      device_mesh: the devices, set as JAX's mesh.

    Returns:
      What `results.json` holds.

    Raises:
      InputError: the run is not trained to its end, or the catalogue is another one.
    """
    config = run.config
    check_catalog_of_run(run, catalog, "evaluate on the catalogue it was trained on (--catalog)")
    model = restore_params(run, device_mesh)
    weights, max_photos = visual_weights(model), config.eval.max_photos
    few_classes = model.num_classes <= config.eval.analysis_up_to_classes
    predict_step = make_predict_step(
        config, model.graphs.visual, model.num_classes, with_post_hoc=few_classes
    )
    predictions = predict_split(
        predict_step,
        weights,
        catalog.splits["test"],
        config,
        device_mesh,
        max_photos=max_photos,
        keep_embedding=few_classes,
    )
    on_validation = {}
    if few_classes and len(validation := catalog.splits["validation"]):
        on_validation = post_hoc_accuracy(
            predict_split(
                predict_step, weights, validation, config, device_mesh, max_photos=max_photos
            ),
            catalog,
            config,
        )
    boundary = head_boundary(catalog, config)
    info = {
        "post_hoc_on_validation": on_validation,
        "catalog": catalog_statistics(catalog, boundary),
        "tail_to_head_confusions": tail_to_head_confusions(
            predictions.label,
            predictions.top_classes[:, 0],
            catalog.classes.counts["train"],
            boundary,
            catalog.classes.sku,
        ),
        "attention": title_attention(model, with_words_of(run, catalog))
        if config.loss.with_semantic
        else {},
        "step": model.step,
        "step_of_end": run.total_steps(),
        "when": utc_now(),
        "commit": code_commit(),
        "version": __version__,
        "hardware": hardware_name(device_mesh),
    }
    return write_results(run.workdir, predictions, catalog, config, split="test", info=info)
