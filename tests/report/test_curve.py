"""Gains over a config field: cells, figure, refusals, one reference."""

import numpy as np
import pytest
from helpers.finished_runs import FIRST, SECOND, make_run
from PIL import Image

from sicot_jax.errors import InputError
from sicot_jax.report.curve import write_curve


def make_point(folder, value, co_training):
    """A baseline and a run with text on the catalogue of that informativeness: another one at every
    value.
    """
    data = {"data": f"{value}" * 16, "test_set": f"{value}" * 16}
    at = {"generated": {"informativeness": value}}
    base = make_run(
        folder / "baseline/rate_0.1/seed_3", FIRST, hashes=data, data=at, loss={"mixed": 0.0}
    )
    text = make_run(
        folder / "co_training/rate_0.2/seed_3",
        co_training,
        hashes=data,
        data=at,
        loss={"mixed": 1.0},
    )
    return [text, base]


def test_gains_over_a_field_of_the_config(tmp_path):
    runs = make_point(tmp_path / "half", 0.5, SECOND) + make_point(tmp_path / "none", 0.0, FIRST)
    table = write_curve(runs, tmp_path / "out", field="data.generated.informativeness")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if "|" in line
    ]
    gain = {row[0]: row[2] for row in rows if row[1] == "co-training - baseline"}
    assert gain["0"].startswith("~+0.00")
    assert gain["0.5"].startswith("~+37.50")  # 6 of 8 instead of 3
    assert [row[0] for row in rows[2:]] == ["0"] * 3 + ["0.5"] * 3
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 1
    with Image.open(tmp_path / "out" / "gains.png") as image:
        line = np.all(
            np.asarray(image.convert("RGB")) == (0xD5, 0x5E, 0x00), -1
        )  # colour of the first variant
        assert line.sum() > 300
    page = (tmp_path / "out" / "report.md").read_text()
    assert "with one seed each the interval does not cover the variance between trainings" in page
    assert "| half/baseline/rate_0.1/seed_3 " in page
    assert "| none/baseline/rate_0.1/seed_3 " in page


def test_a_curve_needs_a_number_of_several_values(tmp_path):
    runs = make_point(tmp_path / "half", 0.5, SECOND)
    with pytest.raises(InputError, match=r"0\.5 in all of these runs"):
        write_curve(runs, tmp_path / "out", field="data.generated.informativeness")
    with pytest.raises(InputError, match="nonsense is None, wanted a number"):
        write_curve(runs, tmp_path / "out", field="nonsense")
    with pytest.raises(InputError, match="given twice"):
        write_curve([*runs, runs[0]], tmp_path / "out", field="data.generated.informativeness")
    lone = [make_point(tmp_path / "none", 0.0, FIRST)[1], runs[1]]
    with pytest.raises(InputError, match=r"no value of .* has a variant besides baseline"):
        write_curve(lone, tmp_path / "out", field="data.generated.informativeness")
    texts = [tmp_path / folder / "co_training/rate_0.2/seed_3" for folder in ("none", "half")]
    with pytest.raises(InputError, match="no plain baseline at every value"):
        write_curve(texts, tmp_path / "out", field="data.generated.informativeness")
    assert not (tmp_path / "out").exists()


def test_a_curve_has_one_reference(tmp_path):
    """The doubled baseline is the better one at 0 by a little, the baseline at 0.5 by much."""
    runs = make_point(tmp_path / "half", 0.5, SECOND) + make_point(tmp_path / "none", 0.0, FIRST)
    for folder, value, top1 in [("half", 0.5, 10.0), ("none", 0.0, 21.0)]:
        data = {"data": f"{value}" * 16, "test_set": f"{value}" * 16}
        config = {
            "data": {"generated": {"informativeness": value}},
            "loss": {"mixed": 0.0, "visual": 2.0},
        }
        name = tmp_path / folder / "doubled_baseline/rate_0.1/seed_3"
        runs.append(make_run(name, FIRST, hashes=data, validation=(top1,), **config))
    table = write_curve(runs, tmp_path / "out", field="data.generated.informativeness")
    assert "- doubled-baseline" not in table
    assert table.count("doubled-baseline - baseline") == 2


def test_a_point_of_a_curve_compares_one_test_set(tmp_path):
    runs = make_point(tmp_path / "half", 0.5, SECOND) + make_point(tmp_path / "none", 0.0, FIRST)
    other = make_run(
        tmp_path / "other" / "seed_3", FIRST, data={"generated": {"informativeness": 0.0}}
    )
    with pytest.raises(InputError, match="informativeness=0 are of several data"):
        write_curve([*runs, other], tmp_path / "out", field="data.generated.informativeness")
