"""`sicot import` as users type it: what it prints, and what it refuses."""

import os

import numpy as np
import pytest
from PIL import Image

from sicot_jax.cli import main as cli


@pytest.fixture
def manifest(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["image,sku,title"]
    for i in range(28):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,sku{i % 4},word{i % 4} red")
    (folder / "products.csv").write_text("\n".join(lines) + "\n")
    return folder / "products.csv"


def test_an_import_prints_a_summary(tmp_path, manifest, capsys):
    command = ["import", os.fspath(manifest), "--out", os.fspath(tmp_path / "out")]
    assert cli.main([*command, "--workers=1", "--short-side=16"]) == 0
    out = capsys.readouterr().out
    assert "28 rows read, 28 photos kept in 4 classes" in out
    assert "report.md" in out


def test_an_import_wants_one_source_and_a_folder_to_write(tmp_path, manifest, capsys):
    source = os.fspath(manifest)
    for arguments, message in (
        (["--out", os.fspath(tmp_path)], "--dataset NAME --from DIR"),
        ([source, "--from", source, "--out", os.fspath(tmp_path)], "--dataset NAME --from DIR"),
        ([source, "--out", source], "products.csv: File exists; check --out"),
        ([source, "--out", os.fspath(tmp_path), "--titles-catalog=x"], "give --titles-from"),
    ):
        assert cli.main(["import", *arguments]) == cli.INPUT_ERROR
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
