"""`sicot index build`: makes the next version of an index from a finished run and its catalogue.

The version is written in INDEX/.building, where a build that was stopped is continued, and becomes
the version in use when it is complete.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from sicot_jax.catalog.open import open_catalog
from sicot_jax.common.files import file_sha256
from sicot_jax.errors import InputError
from sicot_jax.export.from_run import ExportedRun, export_run
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.binary_codes import (
    LEARNED,
    PCA,
    BinaryEncoder,
    check_code_bits,
    encoder_from_layer,
)
from sicot_jax.index.storage.vectors import import_faiss
from sicot_jax.indexing.calibrate import calibrate_version
from sicot_jax.indexing.embed import IndexSource, PhotoReading, match_catalog
from sicot_jax.indexing.mass_changes import MAX_CHANGE_SHARE, check_new_version
from sicot_jax.indexing.verify import verify_version
from sicot_jax.indexing.version_writer import (
    CodeSettings,
    VersionInputs,
    write_calibration_files,
    write_version,
)
from sicot_jax.search.ranker import read_ranker
from sicot_jax.search.rejection import MIN_PHOTOS
from sicot_jax.training.run import fit_run_to_devices, mesh_of_config, read_run

DEFAULT_BITS = 256


def build_index(
    workdir: Path,
    index: Path,
    *,
    catalog_path: str = "",
    code_kind: str = PCA,
    bits: int = DEFAULT_BITS,
    max_change_share: float = MAX_CHANGE_SHARE,
) -> Path:
    """Builds a new index version from a finished run and makes it the version in use.

    Products are matched to the model's classes by SKU; new ones get class weights from their
    photos. Embeddings that the version in use has from the same model are copied.

    Args:
      workdir: run folder.
      index: index folder; made where there is none.
      catalog_path: catalogue folder instead of the run's: it was moved, or has grown.
      code_kind: one of `binary_codes.CODE_KINDS`.
      bits: bits of a code, a multiple of 8.
      max_change_share: share of the products of the version in use that may be withdrawn, renamed,
        or lose title or category.

    Returns:
      Folder of the new version.

    Raises:
      InputError: an unfinished run, no photo, more changes than allowed, another process at work
        in `index`, or "learned" of a run without a code layer.
    """
    check_code_bits(bits)
    import_faiss()  # fails here without it, before anything is computed
    run = read_run(workdir)
    run = fit_run_to_devices(run, mesh_of_config(run.config), catalog_path=catalog_path)
    source = match_catalog(open_catalog(run.config.data), run.class_table())
    check_new_version(index, source, max_change_share)
    results, data = workdir / "results.json", run.config.data
    with layout.write_lock(index, create=True):
        folder = index / layout.BUILDING
        with export_run(workdir) as recognizer:
            learned = _learned_encoder(recognizer, bits, workdir) if code_kind == LEARNED else None
            inputs = VersionInputs(
                recognizer,
                source,
                PhotoReading(run.config.eval.batch_size, data.workers, data.source),
                CodeSettings(code_kind, bits, learned),
                run=workdir.absolute().name,
                results_sha256=file_sha256(results) if results.exists() else "",
            )
            write_version(folder, index, inputs)
            if importlib.util.find_spec("torch") and importlib.util.find_spec("onnxscript"):
                _write_onnx_model(folder, recognizer)
        _calibrate(folder, source)
        _keep_ranker(index, folder)
        return finish_version(index, folder)


def finish_version(index: Path, folder: Path) -> Path:
    """Checks a version that was written and makes it the version in use.

    Args:
      index: index folder, under its write lock.
      folder: the version being built.

    Returns:
      Folder of the published version.

    Raises:
      InputError: the version is damaged; it is removed, and the version in use stays.
    """
    if faults := verify_version(folder):
        shutil.rmtree(folder)  # it cannot be continued
        raise InputError(f"{folder}: {faults[0]}; the version in use stays, build again")
    (folder / layout.PROGRESS).unlink()
    return layout.publish_version(index, folder)


def _learned_encoder(recognizer: ExportedRun, bits: int, workdir: Path) -> BinaryEncoder:
    if recognizer.code_layer is None:
        raise InputError(
            f"{workdir}: trained without codes (loss.codes=0), wanted some for --codes learned; "
            "give another kind"
        )
    return encoder_from_layer(*recognizer.code_layer, bits=bits)


def _write_onnx_model(folder: Path, recognizer: ExportedRun) -> None:
    from sicot_jax.export.to_onnx import write_onnx

    shutil.rmtree(folder / layout.ONNX_MODEL, ignore_errors=True)
    (folder / layout.ONNX_MODEL).mkdir()
    write_onnx(folder / layout.ONNX_MODEL, recognizer)


def _calibrate(folder: Path, source: IndexSource) -> None:
    fitted = calibrate_version(folder, source.catalog.splits["validation"], source.product_ids)
    if fitted is None:
        print(
            f"fewer than {MIN_PHOTOS} validation photos: no answer is rejected as unknown, no "
            "photo has a category; import with more",
            file=sys.stderr,
        )
        return
    calibration, fusion = fitted
    if calibration.precision < calibration.target_precision:
        print(
            f"no threshold makes {calibration.target_precision:.0%} of the answers right on "
            f"{calibration.num_photos} validation photos; the one used reaches "
            f"{calibration.precision:.0%}",
            file=sys.stderr,
        )
    write_calibration_files(folder, calibration, fusion)


def _keep_ranker(index: Path, folder: Path) -> None:
    """Copies the ranker of the version in use, where it was fitted to the same model."""
    try:
        path = layout.current_version(index) / layout.RANKER
        ranker = read_ranker(path)
    except InputError as error:
        if (index / layout.CURRENT).exists():
            print(f"similar products are not ranked: {error}", file=sys.stderr)
        return
    if ranker is None:
        return
    if ranker.recognizer == layout.read_index_manifest(folder).model_sha256:
        shutil.copy(path, folder / layout.RANKER)
    else:
        print(
            "the ranker is of another model: similar products are ranked after `sicot index rank`",
            file=sys.stderr,
        )
