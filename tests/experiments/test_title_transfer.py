"""Title transfer by a finished run: from the nearest photo, never the same one, to training photos
alone.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from sicot_jax.catalog.catalog import SPLITS
from sicot_jax.catalog.sources.imported import open_imported
from sicot_jax.cli import main as cli
from sicot_jax.experiments import title_transfer
from sicot_jax.parallel.mesh import make_mesh

WORDS = ["--word-width=8", "--word-epochs=1", "--min-count=1", "--workers=1", "--short-side=32"]
PHOTOS = 24  # with a title, in eight products: no device without a class


def pixels(number: int, noise: int = 0) -> np.ndarray:
    """Sixteen blocks of random colours; `noise` makes near copies."""
    blocks = np.random.default_rng(number).integers(8, 248, (4, 4, 3))
    photo = blocks.repeat(8, 0).repeat(8, 1)
    return (
        photo + np.random.default_rng([number, noise]).integers(0, 4, photo.shape) * bool(noise)
    ).astype(np.uint8)


def save(path, photo: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo).save(path)


def records(folder):
    catalog = open_imported(folder)
    return {
        split: [catalog.splits[split][i] for i in range(len(catalog.splits[split]))]
        for split in SPLITS
    }


def number_of(record) -> int:
    """Of "shop/sku/7.png": 7."""
    return int(record["reference"].rpartition("/")[2].removesuffix(".png"))


@pytest.fixture(scope="module")
def world(make_once):
    """`titled` imported and trained on for two steps as `run`; `near` holds near copies of its
    photos by SKU, `same` copies.
    """
    return make_once("world", make_world)


def make_world(root):
    lines = ["image,sku,title,split"]
    for i in range(PHOTOS + 6):
        split = "train" if i < PHOTOS else ("validation", "test")[i % 2]
        save(root / "photos" / f"{i}.png", pixels(i))
        lines.append(f"photos/{i}.png,sku{i % 8},title{i} of{i % 8},{split}")
        for name, noise in (("near", 1), ("same", 0)):
            save(root / name / f"other{i % 2}" / f"{i}.png", pixels(i, noise))
    (root / "titled.csv").write_text("\n".join(lines) + "\n")
    assert cli.main(["import", str(root / "titled.csv"), f"--out={root / 'titled'}", *WORDS]) == 0
    size = [
        f"--config.preprocessing.{name}=32"
        for name in ("height", "width", "resize_height", "resize_width")
    ]
    data = [
        "--config.data.source=imported",
        f"--config.data.path={root / 'titled'}",
        "--config.mesh.data=1",
    ]
    short = ["--config.train.steps=2", "--config.train.batch_size=8"]
    assert (
        cli.main(["train", "--config=tiny", f"--workdir={root / 'run'}", *data, *size, *short]) == 0
    )


def import_with_titles(world, source, out, *options):
    arguments = [
        "import",
        str(world / source),
        f"--out={out}",
        f"--titles-from={world / 'run'}",
        *WORDS,
    ]
    assert cli.main([*arguments, *options]) == 0
    return out


def test_a_near_copy_gets_the_title_of_its_original(world, tmp_path, capsys):
    """Of the photos that the run was trained on; near copies of its test and validation photos find
    others.
    """
    out = import_with_titles(world, "near", tmp_path / "out")
    by_split = records(out)
    seen = [record for record in by_split["train"] if number_of(record) < PHOTOS]
    assert len(seen) > 10
    for record in seen:
        assert record["title"] == f"title{number_of(record)} of{number_of(record) % 8}"
        assert len(record["token_ids"]) == 2
    original_titles = {f"title{i} of{i % 8}" for i in range(PHOTOS)}
    assert {record["title"] for record in by_split["train"]} <= original_titles
    assert {record["title"] for split in ("validation", "test") for record in by_split[split]} == {
        ""
    }

    folder = next((out / "near").glob("1.*"))
    report = json.loads((folder / "report.json").read_text())["title_transfer"]
    stored = json.loads((world / "run" / "config.json").read_text())
    assert report["run"] == "run"
    assert report["commit"] == stored["commit"]
    assert (
        report["data_hash"] == stored["data"]["hash"] == open_imported(world / "titled").data_hash
    )
    assert report["photos_without_title"] == report["transferred"] == len(by_split["train"])
    assert report["share"] == 1
    assert 0.9 < report["median_similarity"] <= 1.001
    first = by_split["train"][0]
    assert report["rows"][0].startswith(f"{first['reference']}: {first['title']} (from photo ")
    count = len(by_split["train"])
    line = f"transferred titles: {count} of {count} train photos without one (100.0%), "
    assert line in capsys.readouterr().out
    assert line in (folder / "report.md").read_text()
    description = json.loads((folder / "catalog.json").read_text())
    assert description["title_source"] == {
        name: report[name] for name in ("run", "data_hash", "commit")
    }


def test_a_photo_is_never_given_the_title_of_itself(world, tmp_path):
    train_records = records(import_with_titles(world, "same", tmp_path / "out"))["train"]
    copies = [record for record in train_records if number_of(record) < PHOTOS]
    assert copies
    assert all(record["title"] for record in copies)
    assert not [
        record for record in copies if record["title"].startswith(f"title{number_of(record)} ")
    ]


def test_repeated_import_is_equal_and_the_next_version(world, tmp_path):
    """Also from a catalogue that was moved; without titles it is another catalogue."""
    out = import_with_titles(world, "near", tmp_path / "out")
    first = open_imported(out)
    shutil.copytree(world / "titled", tmp_path / "moved")
    import_with_titles(world, "near", out, f"--titles-catalog={tmp_path / 'moved'}")
    second = open_imported(out)
    assert {folder.name for folder in (out / "near").iterdir()} == {"1.0.0", "1.0.1"}
    assert first.data_hash == second.data_hash
    assert cli.main(["import", str(world / "near"), f"--out={out}", *WORDS]) == 0
    assert (out / "near" / "1.0.2").exists()
    assert open_imported(out).data_hash != first.data_hash


def changed_run(world, folder, change):
    """A copy of the run whose config.json is `change`d."""
    shutil.copytree(world / "run", folder)
    stored = json.loads((folder / "config.json").read_text())
    change(stored)
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


def test_unusable_title_sources_are_refused_in_one_line(world, tmp_path, capsys):
    def refused(run, *options):
        out = tmp_path / "out"
        assert (
            cli.main(
                [
                    "import",
                    str(world / "near"),
                    f"--out={out}",
                    f"--titles-from={run}",
                    *WORDS,
                    *options,
                ]
            )
            == 2
        )
        assert not out.exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "wanted the config.json of a training run" in refused(tmp_path)
    unfinished = changed_run(
        world, tmp_path / "unfinished", lambda stored: stored["config"]["train"].update(steps=9)
    )
    assert "is trained for 2 of 9 steps" in refused(unfinished)
    missing = refused(world / "run", f"--titles-catalog={tmp_path / 'nowhere'}")
    assert "nowhere not found" in missing
    assert "--titles-catalog" in missing

    plain = tmp_path / "plain"
    assert cli.main(["import", str(world / "near"), f"--out={plain}", *WORDS]) == 0
    assert "was trained on data" in refused(world / "run", f"--titles-catalog={plain}")
    untitled = changed_run(
        world,
        tmp_path / "untitled",
        lambda stored: stored["data"].update(hash=open_imported(plain).data_hash),
    )
    assert "has no training photo with a title" in refused(untitled, f"--titles-catalog={plain}")

    assert (
        cli.main(
            [
                "import",
                str(world / "near"),
                f"--out={tmp_path / 'out'}",
                "--titles-min-similarity=0.5",
            ]
        )
        == 2
    )
    assert "give --titles-from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("query_step", "row_step"), [(1 << 10, 1 << 15), (8, 5)], ids=["one_step", "steps"]
)
def test_nearest_neighbour_has_the_largest_cosine(monkeypatch, query_step, row_step):
    """Against all pairs in float64, whatever the step sizes; divided over eight devices."""
    monkeypatch.setattr(title_transfer, "_QUERIES_PER_STEP", query_step)
    monkeypatch.setattr(title_transfer, "_ROWS_PER_STEP", row_step)
    rng = np.random.default_rng(0)
    rows, queries = rng.random((23, 6), np.float32), rng.random((19, 6), np.float32)
    queries[3] = 5 * rows[7]
    queries[4], rows[12] = rows[11], 2 * rows[11]  # equals: the first, unless it is the same photo
    queries[5] = rows[11]
    row_ids, ids = np.arange(23, dtype=np.int32), np.arange(100, 119, dtype=np.int32)
    ids[5] = 11
    device_mesh = make_mesh(devices=jax.devices()[:8])
    nearest, similarity = title_transfer.nearest_neighbours(
        queries, rows, ids, row_ids, device_mesh
    )
    unit = [
        x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
        for x in (queries, rows)
    ]
    cosine = np.where(ids[:, None] == row_ids, -np.inf, unit[0] @ unit[1].T)
    np.testing.assert_allclose(similarity, cosine.max(1), atol=1e-6)
    expected = np.argmax(np.round(cosine, 6), 1)
    np.testing.assert_array_equal(nearest, expected)
    assert nearest[3] == 7
    assert nearest[4] == 11
    assert nearest[5] == 12

    nearest, similarity = title_transfer.nearest_neighbours(
        queries[:2], rows[:1], np.zeros(2, np.int32), row_ids[:1], device_mesh
    )
    assert nearest.tolist() == [-1, -1]
    assert np.isneginf(similarity).all()
