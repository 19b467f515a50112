"""An index whose codes lie in Milvus, against the same in files.

A real Milvus Lite, in a separate environment: it has binary vectors up to 2.5, which needs an
older setuptools than other packages here.
"""

import json
import os
import subprocess
import sys
import venv

import numpy as np
import pytest
from conftest import ROOT
from helpers import placeholders
from helpers.made_photos import jpeg, photo, sku, write_manifest_csv

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.index.backends.open import open_index
from sicot_jax.index.storage import layout
from sicot_jax.indexing.add import add_products
from sicot_jax.indexing.update import remove_products, update_products

PACKAGES = ("milvus-lite==2.5.1", "pymilvus==2.6.17", "setuptools<81", "faiss-cpu==1.15.1")

# Run there: answers of both, as JSON; 9 and 40 candidates are fewer and more than there are photos.
ANSWERS = """
import dataclasses, json, sys
from pathlib import Path
import numpy as np
from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.index.backends.open import open_index, publish_index

index, database = Path(sys.argv[1]), sys.argv[2]
version, messages = layout.current_version(index), []
try:
    open_index(version, database)
except InputError as error:
    messages.append(str(error))
for _ in range(2):
    messages.append(publish_index(index, database))
embeddings = np.random.default_rng(1).random((8, 64)).astype(np.float32)
answers = []
for address in ("", database):
    opened_index = open_index(version, address)
    answers.append([])
    for category in (None, "kind 0", "kind 1", "fresh", "nothing"):
        for candidates in (9, 40):
            options = {"num_photos": 4, "category": category, "candidates": candidates}
            near = opened_index.nearest(embeddings, 3, **options)
            answers[-1].append([dataclasses.asdict(one) for one in near])
    answers[-1].append([opened_index.counts(), dataclasses.asdict(opened_index.product("new"))])
    opened_index.close()
print(json.dumps({"messages": messages, "answers": answers}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Of an environment with Milvus Lite."""
    folder = tmp_path_factory.mktemp("milvus")
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    done = subprocess.run(
        [interpreter, "-m", "pip", "install", "--quiet", *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no Milvus Lite could be installed: {done.stderr.strip()[-200:]}")
    return interpreter


@pytest.mark.slow
@pytest.mark.database
def test_milvus_equals_files(index, python, tmp_path):
    """With added, deleted and recategorised products."""
    rows = [{"image": f"{n}.jpg", "sku": "new", "category": "fresh"} for n in range(3)]
    add_products(
        index,
        write_manifest_csv(
            tmp_path / "feed", rows, {f"{n}.jpg": jpeg(photo(30, n)) for n in range(3)}
        ),
    )
    remove_products(index, [sku(2)], photos=[f"{1:032x}"])
    (tmp_path / "move.csv").write_text(f"sku,category\n{sku(1)},kind 0\n")
    update_products(index, tmp_path / "move.csv")
    database = f"milvus+{tmp_path / 'codes.db'}"
    done = subprocess.run(
        [python, "-c", ANSWERS, str(index), database],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert "has no codes of" in result["messages"][0]
    assert "sicot index publish --index" in result["messages"][0]
    assert result["messages"][1].startswith("v000001: 27 codes new, 27 in sicot_v000001_")
    assert result["messages"][2].startswith("v000001: 0 codes new, 27 in sicot_v000001_")
    files, milvus = result["answers"]
    assert files[-1] == milvus[-1]
    for one, other in zip(
        files[1:-1:2], milvus[1:-1:2], strict=True
    ):  # of 40 candidates: all photos
        assert one == other
    for one, other in zip(
        files[:-1:2], milvus[:-1:2], strict=True
    ):  # of equal distances either may be proposed
        for from_files, from_milvus in zip(one, other, strict=True):
            assert len(from_files["photos"]) == len(from_milvus["photos"])
            assert from_files["products"][:1] == from_milvus["products"][:1]


NEAR_PLACEHOLDERS = """
import json, sys
from pathlib import Path
import numpy as np
from sicot_jax.index.storage import layout
from sicot_jax.index.backends.open import open_index, publish_index

index, database = Path(sys.argv[1]), sys.argv[2]
publish_index(index, database)
opened_index = open_index(layout.current_version(index), database)
near = opened_index.nearest(np.load(sys.argv[3]), 10, candidates=1000)
print(json.dumps([[n.similarity for n in one.products] for one in near]))
"""


@pytest.mark.slow
@pytest.mark.database
def test_recall_among_equal_codes(python, tmp_path):
    version = placeholders.write_index(tmp_path / "index")
    queries = placeholders.near_placeholder(version)
    np.save(tmp_path / "queries.npy", queries)
    arguments = [version.parent, f"milvus+{tmp_path / 'codes.db'}", tmp_path / "queries.npy"]
    done = subprocess.run(
        [python, "-c", NEAR_PLACEHOLDERS, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    without = placeholders.recall_without(version, queries)
    assert placeholders.recall(version, queries, found) >= without


def test_missing_package_is_one_line(index, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(
        InputError, match="no pymilvus here to use Milvus with; install it: pip install"
    ):
        open_index(layout.current_version(index), "milvus+http://127.0.0.1:1")
    assert (
        cli.main(
            ["index", "publish", "--index", str(index), "--database", "milvus+http://127.0.0.1:1"]
        )
        == 2
    )
    assert "no pymilvus here" in capsys.readouterr().err
