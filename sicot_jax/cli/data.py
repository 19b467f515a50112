"""`sicot import` and `sicot export-arrays`: catalogues on disk."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.catalog.importing.run import DATA_SETS
from sicot_jax.catalog.importing.settings import CatalogImportError, ImportSettings
from sicot_jax.cli.options import add_command, add_config_option, add_out_option

if TYPE_CHECKING:
    from sicot_jax.cli.options import Commands


def add_data_commands(commands: Commands) -> None:
    """Adds `sicot import` and `sicot export-arrays`.

    Args:
      commands: sub-parsers object that the command is added to.
    """
    parser = add_command(
        commands, "import", _import, "import a manifest (CSV, Parquet, JSON) or a folder per SKU"
    )
    _add_source_options(parser)
    _add_photo_options(parser)
    _add_word_options(parser)
    _add_title_options(parser)

    parser = add_command(
        commands, "export-arrays", _export_arrays, "write a config's catalogue as one array file"
    )
    add_config_option(parser)
    add_out_option(parser, "file")


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="?",
        type=Path,
        help="manifest (csv, parquet, jsonl, json, also .gz) or folder with one folder per SKU",
    )
    parser.add_argument(
        "--dataset", choices=DATA_SETS, help="a public data set in its owner's layout, in --from"
    )
    parser.add_argument(
        "--from",
        dest="source_folder",
        type=Path,
        metavar="DIR",
        help="folder with the owner's files",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write the catalogue to"
    )
    parser.add_argument("--name", help="name of the catalogue (default: after the source)")
    parser.add_argument(
        "--workers", type=int, help="processes that decode photos (default: one per CPU core)"
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=ImportSettings.max_bad_share,
        help="stop if more than this share of rows is bad",
    )
    parser.add_argument("--max-rows", type=int, metavar="N", help="read only the first N good rows")


def _add_photo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=ImportSettings.seed, help="seed of the splits")
    parser.add_argument(
        "--short-side",
        type=int,
        default=ImportSettings.short_side,
        help="shorter side of stored photos in pixels; photos are never enlarged",
    )
    parser.add_argument(
        "--test-per-class",
        type=int,
        metavar="K",
        help="K test photos for every class that has enough",
    )
    parser.add_argument(
        "--test-share",
        type=float,
        metavar="S",
        help="share of every class to test on (default: 0.2, at most 20 photos)",
    )
    parser.add_argument(
        "--tail-cut",
        type=int,
        metavar="N",
        help="cut the training photos to an exponential tail, from N per class down to 1",
    )
    parser.add_argument(
        "--min-photos", type=int, metavar="N", help="leave out classes with fewer photos"
    )


def _add_word_options(parser: argparse.ArgumentParser) -> None:
    default = ImportSettings
    parser.add_argument(
        "--tokenizer",
        choices=("words", "sentencepiece"),
        default=default.tokenizer,
        help="how titles are split",
    )
    parser.add_argument(
        "--drop-top-share",
        type=float,
        default=default.drop_top_share,
        help="share of the most frequent words that is left out",
    )
    parser.add_argument(
        "--min-count", type=int, default=default.min_count, help="leave out rarer words"
    )
    parser.add_argument(
        "--max-vocabulary", type=int, default=default.max_vocabulary, help="most words to keep"
    )
    parser.add_argument(
        "--word-width", type=int, default=default.word_width, help="width of the word vectors"
    )
    parser.add_argument(
        "--word-epochs",
        type=int,
        default=default.word_epochs,
        help="epochs of training the word vectors",
    )


def _add_title_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--titles-from",
        type=Path,
        metavar="RUN",
        help="finished run on a catalogue with titles; a training photo without a title gets the "
        "title of the most similar photo there",
    )
    parser.add_argument(
        "--titles-catalog",
        default="",
        metavar="DIR",
        help="catalogue of --titles-from, if it was moved",
    )
    parser.add_argument(
        "--titles-min-similarity",
        type=float,
        default=ImportSettings.titles_min_similarity,
        metavar="S",
        help="cosine below which no title is transferred (default: 0, transfer all)",
    )


def _import(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.catalog.importing.run import import_catalog

    if args.titles_from is None and (args.titles_catalog or args.titles_min_similarity):
        raise CatalogImportError(
            "--titles-catalog or --titles-min-similarity without a run to take titles from; give "
            "--titles-from"
        )
    source = args.source_folder if args.dataset else args.source
    if source is None or (args.source is not None and args.source_folder is not None):
        raise CatalogImportError(
            "wanted either a manifest or folder, or --dataset NAME --from DIR; see `sicot import "
            "--help`"
        )
    title_source = None
    if args.titles_from is not None:
        from sicot_jax.experiments.title_transfer import open_title_transfer

        title_source = open_title_transfer(args.titles_from, path=args.titles_catalog)
    fields = [field.name for field in dataclasses.fields(ImportSettings)]
    result = import_catalog(
        source,
        args.out,
        settings=ImportSettings(**{field: getattr(args, field) for field in fields}),
        dataset=args.dataset,
        name=args.name,
        workers=args.workers,
        title_source=title_source,
    )
    print(result.report.summary())
    print(f"written to {result.folder}, report in {result.folder / 'report.md'}")


def _export_arrays(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sicot_jax.catalog.open import open_catalog
    from sicot_jax.catalog.sources.arrays import resize_catalog, write_array_file
    from sicot_jax.config import load_config

    config = load_config(args.config, overrides)
    write_array_file(resize_catalog(open_catalog(config.data), config.preprocessing), args.out)
    path = shlex.quote(f"--config.data.path={args.out}")
    print(f"wrote {args.out}: train with --config.data.source=arrays {path}")
