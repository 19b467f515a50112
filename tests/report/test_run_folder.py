"""A run folder read as a finished run: damage and missing files are one-line errors."""

import pytest
from helpers.finished_runs import FIRST, make_run

from sicot_jax.errors import InputError
from sicot_jax.report.page import write_report
from sicot_jax.report.runs import is_still_improving, read_run_folder


@pytest.mark.parametrize("keep", [0, 3, 300, -30])
def test_a_damaged_predictions_file_is_a_one_line_error(tmp_path, keep):
    run = make_run(tmp_path / "cut", FIRST)
    content = (run / "predictions.npz").read_bytes()
    (run / "predictions.npz").write_bytes(content[:keep])
    with pytest.raises(
        InputError,
        match=r"predictions.npz is damaged .*; write it again: sicot evaluate run --workdir=",
    ):
        read_run_folder(run)


@pytest.mark.parametrize("missing", ["results.json", "config.json", "predictions.npz", "log.jsonl"])
def test_unfinished_run_is_refused_by_name(tmp_path, missing):
    run = make_run(tmp_path / "half_done", FIRST)
    (run / missing).unlink()
    with pytest.raises(
        InputError,
        match=rf"half_done: not a finished run, {missing} is missing; train it to its end",
    ):
        write_report([make_run(tmp_path / "one", FIRST), run], tmp_path / "report")
    with pytest.raises(InputError, match=r"nowhere: not a finished run"):
        read_run_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("validation", "rising"),
    [
        ((10.0, 20.0, 20.4, 20.8), False),
        ((10.0, 20.0, 20.2, 20.8), True),
        ((30.0, 20.0, 20.0, 29.0), False),
        ((40.0,), False),
        ((), False),
    ],
)
def test_still_improving(tmp_path, validation, rising):
    """The last of four validations is in the last quarter; it must beat the best before by more
    than half a point.
    """
    run = make_run(tmp_path / "a_run", FIRST, validation=validation)
    assert is_still_improving(read_run_folder(run)) == rising
