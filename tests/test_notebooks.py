"""The notebooks run from end to end, on small data and eight devices; git holds no outputs."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "CLASSES": 16,
    "PHOTOS": 240,
    "EPOCHS": 1,
    "SIDE": 32,
    "BATCH": 32,
    "STEPS": 12,
    "WIDTH": 8,
    "EMBEDDING_WIDTH": 16,
}


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def repository() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def test_there_are_four_notebooks():
    assert [path.stem.partition("_")[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_and_the_address_of_this_project(path):
    code = cells(path, "code")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    name = repository().removeprefix("https://github.com/")
    badge = f"(https://colab.research.google.com/github/{name}/blob/main/notebooks/{path.name})"
    assert badge in "".join(cells(path, "markdown")[0]["source"])
    install = "".join(code[0]["source"])
    assert install == "".join(cells(NOTEBOOKS[0], "code")[0]["source"])
    assert f"git+{repository()}" in install
    assert '"-c", "pinned.txt"' in install


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    """In an empty folder and a new kernel: every cell ends without an error and prints what it
    should.
    """
    pytest.importorskip("nbclient", reason="notebooks are run by nbclient")
    if path.stem.startswith("4"):
        pytest.importorskip("torch", reason="this notebook converts to PyTorch")
    variables = {f"SICOT_{name}": str(value) for name, value in SMALL.items()}
    variables |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "MPLBACKEND": "agg",
        "IPYTHONDIR": str(tmp_path),
    }
    program = (
        "import sys, nbformat, nbclient\n"
        "notebook = nbformat.read(sys.argv[1], as_version=4)\n"
        "nbclient.NotebookClient(notebook, timeout=500, kernel_name='python3').execute()\n"
        "nbformat.write(notebook, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "executed.ipynb")]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    executed = cells(tmp_path / "executed.ipynb", "code")
    output = "".join("".join(out.get("text", [])) for cell in executed for out in cell["outputs"])
    expected = {
        "1": ("co-training - baseline", "tag-prediction-shared-weights - baseline", "on average:"),
        "2": ("products.csv", "a photo of sku-"),
        "3": ("16 classes x 16 numbers, head class_sharded, on 8 devices", "rows 14 to 16"),
        "4": ("JAX against PyTorch: embedding differs by", "largest difference of an embedding:"),
    }
    for text in expected[path.stem[0]]:
        assert text in output, output[-3000:]
    assert len(executed) == len(cells(path, "code"))
    assert all(cell["execution_count"] for cell in executed)
