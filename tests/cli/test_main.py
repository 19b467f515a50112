"""The `sicot` command as users type it: exit codes, one-line messages, the main job end to end."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sicot_jax.catalog.sources.arrays import open_array_file
from sicot_jax.cli import main as cli
from sicot_jax.cli.options import bot_limits
from sicot_jax.events.bots import BotLimits

ROOT = Path(__file__).parents[2]
TINY = ["--config=tiny", "--config.mesh.data=1", "--config.train.steps=4"]


def fails_with(capsys, arguments, *, code=cli.INPUT_ERROR):
    """Returns the last line on stderr of a command that refuses its input."""
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    line = captured.err.removesuffix("\n").splitlines()[-1]
    # Otherwise the message has several lines.
    assert line.startswith(f"sicot {arguments[0]}: "), captured.err
    return line


def test_the_main_job_end_to_end(tmp_path, capsys):
    """`compare` on the tiny config: two runs, a report with a table and a figure; a second call
    trains nothing.
    """
    command = ["compare", *TINY, f"--workdir={tmp_path / 'run'}"]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    for row in ("baseline", "co-training", "co-training - baseline", "test photos"):
        assert f"| {row}" in table
    report = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "11 classes, 3 of them head" in report
    assert (tmp_path / "run" / "report" / "class_histogram.png").stat().st_size > 5000
    configs = [
        json.loads((tmp_path / "run" / variant / "config.json").read_text())["config"]
        for variant in ("baseline", "co_training")
    ]
    assert [config.pop("loss")["mixed"] for config in configs] == [0.0, 1.0]
    assert configs[0] == configs[1]  # the same schedule, data and seed
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/results.json")}
    assert cli.main(command) == 0
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/results.json")
    }


@pytest.mark.slow
def test_arrays_train_like_the_catalogue_they_came_from(tmp_path, capsys):
    """The same photos and words in the same order give the same run, to the bit; also with all
    photos on the devices.
    """
    assert cli.main(["export-arrays", "--config=tiny", f"--out={tmp_path / 'tiny.npz'}"]) == 0
    arrays = ["--config.data.source=arrays", f"--config.data.path={tmp_path / 'tiny.npz'}"]
    kinds = {
        "generated": [],
        "arrays": arrays,
        "on_device": [*arrays, "--config.data.on_device=true"],
    }
    for name, extra in kinds.items():
        command = ["train", *TINY, f"--workdir={tmp_path / name}", *extra]
        assert cli.main(command) == 0
    first, *others = [
        json.loads((tmp_path / name / "results.json").read_text())["accuracy"] for name in kinds
    ]
    assert all(accuracy == first for accuracy in others)
    first, *others = [
        [
            json.loads(line).get("total")
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in kinds
    ]
    assert all(log == first for log in others)


def test_an_array_file_of_another_photo_size_is_refused(tmp_path, capsys):
    assert cli.main(["export-arrays", "--config=tiny", f"--out={tmp_path / 'tiny.npz'}"]) == 0
    arrays = ["--config.data.source=arrays", f"--config.data.path={tmp_path / 'tiny.npz'}"]
    sizes = ["--config.preprocessing.resize_height=32", "--config.preprocessing.resize_width=32"]
    line = fails_with(
        capsys, ["train", "--config=tiny", f"--workdir={tmp_path / 'run'}", *arrays, *sizes]
    )
    assert "holds photos of 24x24, the config wants 32x32; export again" in line


@pytest.mark.slow
def test_training_from_arrays_needs_only_numpy_and_jax(tmp_path):
    """As on a bare accelerator image: other packages are hidden from the import system."""
    cli.main(["export-arrays", "--config=tiny", f"--out={tmp_path / 'tiny.npz'}"])
    arrays = [
        "--config.data.source=arrays",
        f"--config.data.path={tmp_path / 'tiny.npz'}",
        "--config.train.steps=2",
    ]
    command = [
        "train",
        "--config=tiny",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.tensorboard=True",
        *arrays,
    ]
    program = f"""
import sys
for name in ("tensorflow_datasets", "grain", "PIL", "pyarrow", "gensim", "sentencepiece",
             "ml_collections", "matplotlib", "tensorboardX", "tqdm", "array_record", "tensorflow"):
    sys.modules[name] = None  # importing it raises ImportError
from sicot_jax.cli.main import main
sys.exit(main({command!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "overall" in done.stdout
    assert "no tensorboardX here" in done.stderr


def test_tensorflow_is_never_imported():
    """Also where it is not installed: every module of the package, and what they import when they
    are used.
    """
    program = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        # No ImportError, which those who would do without it catch.
        assert name.partition(".")[0] != "tensorflow", name

sys.meta_path.insert(0, Refuse())
import sicot_jax
for module in pkgutil.walk_packages(sicot_jax.__path__, "sicot_jax."):
    if module.name != "sicot_jax.main":
        importlib.import_module(module.name)
import grain, orbax.checkpoint, tensorboardX, tensorflow_datasets
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config=fashoin"], "no such file and no bundled config"),
        (
            ["train", "--config=tiny", "--config.optim.learning_rat=1"],
            "did you mean optim.learning_rate?",
        ),
        (["train", "--config=tiny", "--config.optim.learning_rate=fast"], "learning_rate"),
        (["train", "--config=fashion", "--config.data.path=nowhere"], "nowhere"),
        (["train", "--config=tiny", "--config.mesh.data=64"], "wants 64 devices, found 8"),
        (["train", "--config=tiny", "--config.train.batch_size=20"], "not divisible by 8 devices"),
        (
            ["train", "--config=tiny", "--config.model.init_from=nowhere"],
            "wanted the config.json of a training run",
        ),
        (["evaluate", "run", "--workdir=nowhere"], "wanted the config.json of a training run"),
        (["report", "runs", "nowhere", "--out=report"], "not a finished run"),
        (
            ["compare", "--config=tiny", "--config.loss.mixed=0"],
            "comparing needs a config that uses text",
        ),
    ],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails_with(capsys, arguments)


def test_overrides_belong_to_commands_with_a_config(capsys):
    assert "is for commands that take --config" in fails_with(
        capsys, ["evaluate", "run", "--workdir=x", "--config.train.steps=1"]
    )


def test_compare_notices_that_a_manifest_or_its_photos_changed(tmp_path, capsys):
    """Without titles it stops after the import, so nothing is trained here."""
    for i in range(9):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    manifest = tmp_path / "p.csv"
    manifest.write_text("image,sku\n" + "".join(f"{i}.png,A\n" for i in range(9)))
    command = ["compare", f"--manifest={manifest}", f"--workdir={tmp_path / 'run'}"]
    catalog = tmp_path / "run" / "catalog"
    changed = (
        f"p.csv or its photos changed since the import of p.csv into {catalog}; give another "
        "--workdir"
    )
    for _ in range(2):
        refusal = fails_with(capsys, command)
        assert "has no title with a known word" in refusal
        assert "sicot import --titles-from RUN" in refusal
    photo = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    assert changed in fails_with(capsys, command)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "0.png").write_bytes(photo)
    assert "has no title with a known word" in fails_with(capsys, command)
    manifest.write_text(manifest.read_text().replace("8.png,A", "8.png,B"))
    assert changed in fails_with(capsys, command)


def test_an_array_file_knows_how_its_photos_were_resized(tmp_path, capsys):
    hashes = set()
    for fit in ("crop", "pad"):
        out = tmp_path / f"{fit}.npz"
        assert (
            cli.main(
                [
                    "export-arrays",
                    "--config=tiny",
                    f"--config.preprocessing.fit={fit}",
                    f"--out={out}",
                ]
            )
            == 0
        )
        catalog = open_array_file(out)
        assert catalog.resized_by == {"resize_height": 24, "resize_width": 24, "fit": fit}
        hashes.add(catalog.data_hash)
    assert len(hashes) == 2


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """All parsers without sub-commands."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for group in groups:
        for child in group.choices.values():
            yield from parsers(child)
    if not groups:
        yield parser


def test_every_argument_has_help():
    for parser in parsers(cli.make_parser()):
        assert parser.description, parser.prog
        assert callable(parser.get_default("run")), parser.prog
        for action in parser._actions:
            assert action.help, (parser.prog, action.dest)
        assert parser.format_help()


@pytest.mark.parametrize("command", ["report", "evaluate", "convert", "index", "events"])
def test_a_group_needs_a_command(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([command])
    assert "the following arguments are required: COMMAND" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom sicot_jax.cli.main import make_parser\nmake_parser().format_help()\n"
        "heavy = {'jax', 'tensorflow_datasets', 'PIL', 'pyarrow', 'gensim', 'fastapi'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


_LIMITS = BotLimits(
    max_views_per_day=7, max_clicks_per_day=6, max_click_share=0.25, min_interval=2.5, min_events=5
)
_LIMIT_OPTIONS = [
    *("--max-views-per-day=7", "--max-clicks-per-day=6", "--max-click-share=0.25"),
    *("--min-interval=2.5", "--min-events=5"),
]
_RANK = ["index", "rank", "--index=i", "--events", "e", "--queries=q"]


@pytest.mark.parametrize("command", [["events", "triplets", "e", "--out=o"], _RANK])
def test_triplets_and_ranker_have_the_same_bot_options(command):
    parser = cli.make_parser()
    assert bot_limits(parser.parse_args(command)) == BotLimits()
    assert bot_limits(parser.parse_args([*command, *_LIMIT_OPTIONS])) == _LIMITS


def test_ranker_is_given_the_bot_limits(monkeypatch, capsys):
    fit_ranker = pytest.importorskip("sicot_jax.indexing.fit_ranker")
    monkeypatch.setattr(fit_ranker, "fit_index_ranker", lambda *arguments: arguments[-1])
    assert cli.main([*_RANK, *_LIMIT_OPTIONS]) == 0
    assert capsys.readouterr().out == f"{_LIMITS}\n"


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
