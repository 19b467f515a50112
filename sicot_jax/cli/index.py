"""`sicot index`: build, change, check and copy the product index."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.cli.options import (
    Handler,
    add_bot_options,
    add_command,
    add_group,
    add_out_option,
    bot_limits,
)
from sicot_jax.common.sku import normalize_skus
from sicot_jax.errors import InputError
from sicot_jax.index.storage.binary_codes import CODE_KINDS, PCA
from sicot_jax.indexing.mass_changes import MAX_CHANGE_SHARE

if TYPE_CHECKING:
    from sicot_jax.cli.options import Commands

_MAX_DROPPED_LINES = 20


def add_index_commands(commands: Commands) -> None:
    """Adds the sub-commands of `sicot index`.

    Args:
      commands: sub-parsers object that the command is added to.
    """
    group = add_group(commands, "index", "build, change and check the product index of the service")
    _add_build(group)
    _add_nightly(group)
    _add_change_commands(group)
    _add_rank(group)
    _add_copy_commands(group)


def _add_index_command(
    group: Commands, name: str, handler: Handler, description: str
) -> argparse.ArgumentParser:
    """A sub-command that works on an existing index."""
    parser = add_command(group, name, handler, description)
    parser.add_argument("--index", type=Path, required=True, help="folder of sicot index build")
    return parser


def _add_build(group: Commands) -> None:
    parser = add_command(
        group,
        "build",
        _build,
        "build the next version of an index from a finished run and its catalogue's photos",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="run folder")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the index; the new version is used as soon as it is complete",
    )
    parser.add_argument(
        "--catalog",
        default="",
        help="catalogue to use instead of the run's: it was moved, or has grown",
    )
    parser.add_argument(
        "--codes",
        choices=CODE_KINDS,
        default=PCA,
        help="how binary codes are made; learned: by the run itself (loss.codes) (default: pca)",
    )
    parser.add_argument(
        "--bits", type=int, default=256, help="bits of a photo's code (default: 256)"
    )
    _add_change_limit(parser)


def _add_nightly(group: Commands) -> None:
    parser = add_command(
        group,
        "nightly",
        _nightly,
        "import changes, build the next version, check and use it; for a timer, safe to repeat",
    )
    parser.add_argument(
        "--manifest", type=Path, required=True, help="manifest, or folder with one folder per SKU"
    )
    parser.add_argument(
        "--catalog",
        type=Path,
        required=True,
        help="folder of sicot import; created where there is none",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="run folder")
    parser.add_argument("--index", type=Path, required=True, help="the index")
    parser.add_argument(
        "--database",
        default="",
        metavar="URL",
        help="publish to this database too: postgresql://USER@HOST/DATABASE",
    )
    parser.add_argument("--report", type=Path, help="JSON file to write a report to")
    _add_change_limit(parser)


def _add_change_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-change-share",
        type=float,
        default=MAX_CHANGE_SHARE,
        metavar="S",
        help="stop if more than this share of the products would be withdrawn, renamed, lose title "
        "or category, or get the price 0 (default: 0.2; 1 for no limit)",
    )


def _add_change_commands(group: Commands) -> None:
    parser = _add_index_command(
        group,
        "add",
        _add,
        "add products and photos of a manifest, or of a folder with one folder per SKU",
    )
    parser.add_argument("source", type=Path, help="manifest or folder")
    _add_change_limit(parser)

    parser = _add_index_command(
        group,
        "update",
        _update,
        "update titles, tags, categories, price, sales, conversion and rating",
    )
    parser.add_argument("source", type=Path, help="CSV, Parquet or JSON with a column sku")
    _add_change_limit(parser)

    parser = _add_index_command(group, "remove", _remove, "delete products, or single photos")
    parser.add_argument("skus", nargs="*", metavar="SKU", help="products to delete")
    parser.add_argument("--file", type=Path, help="file with a SKU per line")
    parser.add_argument(
        "--photo",
        action="append",
        default=[],
        metavar="IMAGE_ID",
        help="a photo to delete; can be repeated",
    )
    _add_change_limit(parser)


def _add_rank(group: Commands) -> None:
    parser = _add_index_command(
        group,
        "rank",
        _rank,
        "fit the ranking of similar products, by similarity and quality, to recorded clicks",
    )
    parser.add_argument(
        "--events",
        type=Path,
        nargs="+",
        required=True,
        help="files of sicot serve --events, one per machine, or folders of sicot events import",
    )
    parser.add_argument(
        "--queries",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of sicot serve --keep-queries: query photos",
    )
    add_bot_options(parser)


def _add_copy_commands(group: Commands) -> None:
    parser = _add_index_command(
        group,
        "export",
        _export,
        "write products, photos, embeddings and codes as Parquet, with the recogniser",
    )
    add_out_option(parser, "folder")

    parser = _add_index_command(
        group, "import", _import, "use an export as the next version of an index"
    )
    parser.add_argument("source", type=Path, help="folder of sicot index export")
    _add_change_limit(parser)

    parser = _add_index_command(
        group,
        "publish",
        _publish,
        "copy the version in use, or its changes, to PostgreSQL with pgvector, or its codes to "
        "Milvus",
    )
    parser.add_argument(
        "--database",
        required=True,
        metavar="URL",
        help="postgresql://USER@HOST/DATABASE, or milvus+http://HOST:PORT",
    )

    parser = _add_index_command(
        group,
        "split",
        _split,
        "copy the version in use to a new index of several shards, which are searched as one",
    )
    add_out_option(parser, "folder")
    parser.add_argument(
        "--shards", type=int, required=True, help="shards; each product is in one of them"
    )

    _add_index_command(
        group,
        "verify",
        _verify,
        "check that the version in use is complete and unchanged; reads all of it",
    )


def _build(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.build import build_index

    version = build_index(
        args.workdir,
        args.out,
        catalog_path=args.catalog,
        code_kind=args.codes,
        bits=args.bits,
        max_change_share=args.max_change_share,
    )
    print(f"{version} is in use: sicot serve --index {args.out}")


def _nightly(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.nightly import NightlyPaths, run_nightly

    paths = NightlyPaths(args.manifest, args.catalog, args.workdir, args.index)
    report = run_nightly(
        paths,
        database=args.database,
        report_file=args.report,
        max_change_share=args.max_change_share,
    )
    print(report.summary())


def _add(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.add import add_products

    report = add_products(args.index, args.source, max_change_share=args.max_change_share)
    for line in report.dropped[:_MAX_DROPPED_LINES]:
        print(f"dropped: {line}", file=sys.stderr)
    if len(report.dropped) > _MAX_DROPPED_LINES:
        print(f"dropped: {len(report.dropped) - _MAX_DROPPED_LINES} more", file=sys.stderr)
    print(report.summary())


def _update(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.update import update_products

    updated = update_products(args.index, args.source, max_change_share=args.max_change_share)
    print(f"{updated} products updated")


def _remove(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.update import read_sku_list, remove_products

    skus = [*normalize_skus(args.skus), *(read_sku_list(args.file) if args.file else [])]
    if not skus and not args.photo:
        raise InputError("nothing to remove: give SKUs, --file or --photo")
    # SKUs that were typed one by one are meant.
    share = args.max_change_share if args.file else 1.0
    removed = remove_products(args.index, skus, photos=args.photo, max_change_share=share)
    print(f"{removed} deleted")


def _rank(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.fit_ranker import fit_index_ranker

    print(fit_index_ranker(args.index, args.events, args.queries, bot_limits(args)))


def _export(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.parquet import export_index

    counts = export_index(args.index, args.out)
    print(f"wrote {args.out}: {counts['products']} products, {counts['photos']} photos")


def _import(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.parquet import import_index

    version = import_index(args.source, args.index, max_change_share=args.max_change_share)
    print(f"{version} is in use")


def _publish(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.index.backends.open import publish_index

    print(publish_index(args.index, args.database))


def _split(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.indexing.split import split_index

    folder = split_index(args.index, args.out, args.shards)
    print(f"{folder}: {args.shards} shards; sicot serve --index {args.out}")


def _verify(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.index.storage import layout
    from sicot_jax.indexing.verify import verify_version

    folder = layout.current_version(args.index)
    if faults := verify_version(folder, checksums=True):
        raise InputError(f"{folder}: {'; '.join(faults)}; build the index again")
    print(f"{folder}: complete")
