"""The sub-commands of `sicot index`; nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sicot_jax.errors import InputError
from sicot_jax.index.storage.binary_codes import KINDS, PCA


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def kind(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = kind(
        "build",
        _build,
        "a finished run and its catalogue's photos, as the next version of an index",
    )
    sub.add_argument("--workdir", type=Path, required=True, help="run folder")
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the index; its version in use is replaced when the new one is whole",
    )
    sub.add_argument(
        "--path",
        default="",
        help="a catalogue folder in place of the run's: it was moved, or has grown",
    )
    sub.add_argument(
        "--codes",
        choices=KINDS,
        default=PCA,
        help="how codes are made; learned: by the run itself (loss.codes) (default: pca)",
    )
    sub.add_argument("--bits", type=int, default=256, help="of a photo's code (default: 256)")

    sub = kind(
        "nightly",
        _nightly,
        "import what changed, embed, build beside, check, switch; for a timer, safe to repeat",
    )
    sub.add_argument(
        "--manifest", type=Path, required=True, help="manifest, or folder with one folder per SKU"
    )
    sub.add_argument(
        "--catalog",
        type=Path,
        required=True,
        help="folder of sicot import; made where there is none",
    )
    sub.add_argument("--workdir", type=Path, required=True, help="run folder")
    sub.add_argument("--index", type=Path, required=True, help="the index")
    sub.add_argument(
        "--database",
        default="",
        metavar="URL",
        help="publish to it too: postgresql://USER@HOST/DATABASE",
    )
    sub.add_argument("--report", type=Path, help="JSON file to write what was done into")

    def changing(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = kind(name, run, help)
        sub.add_argument("--index", type=Path, required=True, help="folder of sicot index build")
        return sub

    sub = changing(
        "add", _add, "products and photos of a manifest, or of a folder with one folder per SKU"
    )
    sub.add_argument("source", type=Path)
    sub = changing(
        "update",
        _update,
        "titles, tags, categories, price, sales, conversion, rating from a CSV by sku",
    )
    sub.add_argument("source", type=Path)
    sub = changing("remove", _remove, "withdraw products, or single photos")
    sub.add_argument("skus", nargs="*", metavar="SKU")
    sub.add_argument("--file", type=Path, help="file with a SKU in each line")
    sub.add_argument(
        "--photo",
        action="append",
        default=[],
        metavar="IMAGE_ID",
        help="a photo, as often as needed",
    )
    sub = changing(
        "rank",
        _rank,
        "fit the order of similar products, by likeness and quality, to what visitors did",
    )
    sub.add_argument(
        "--events",
        type=Path,
        nargs="+",
        required=True,
        help="files of sicot serve --events, one a machine, or folders of sicot events import",
    )
    sub.add_argument(
        "--queries",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of sicot serve --keep-queries: visitors' photos",
    )
    sub = changing(
        "export", _export, "products, photos, features and codes as Parquet, with the recogniser"
    )
    sub.add_argument(
        "--out", type=Path, required=True, help="folder to write, which must not exist"
    )
    sub = changing("import", _import, "an export as the next version of an index")
    sub.add_argument("source", type=Path, help="folder of sicot index export")
    sub = changing(
        "publish",
        _publish,
        "the version in use, or what changed in it, into PostgreSQL with pgvector, or its codes into Milvus",
    )
    sub.add_argument(
        "--database",
        required=True,
        metavar="URL",
        help="postgresql://USER@HOST/DATABASE, or milvus+http://HOST:PORT",
    )
    sub = changing(
        "split", _split, "the version in use in several parts that answer as one, as a new index"
    )
    sub.add_argument(
        "--out", type=Path, required=True, help="folder to write, which must not exist"
    )
    sub.add_argument("--shards", type=int, required=True, help="parts; a product is in one of them")
    changing(
        "verify",
        _verify,
        "whether the version in use is whole and as it was built; reads all of it",
    )


def _build(args: argparse.Namespace, _) -> None:
    from sicot_jax.indexing.build import build

    version = build(args.workdir, args.out, path=args.path, codes=args.codes, bits=args.bits)
    print(f"{version} is in use: sicot serve --index {args.out}")


def _add(args: argparse.Namespace, _) -> None:
    from sicot_jax.indexing import update as change

    found = change.add(args.index, args.source)
    for line in found.dropped[:20]:
        print(f"dropped: {line}", file=sys.stderr)
    if len(found.dropped) > 20:
        print(f"dropped: {len(found.dropped) - 20} more", file=sys.stderr)
    print(found.summary())


def _update(args: argparse.Namespace, _) -> None:
    from sicot_jax.indexing import update as change

    print(f"{change.update(args.index, args.source)} products updated")


def _remove(args: argparse.Namespace, _) -> None:
    from sicot_jax.indexing import update as change

    skus = [*args.skus, *(args.file.read_text().split("\n") if args.file else [])]
    skus = [sku.strip() for sku in skus if sku.strip()]
    if not skus and not args.photo:
        raise InputError("nothing to remove: give SKUs, --file or --photo")
    print(f"{change.remove(args.index, skus, photos=args.photo)} withdrawn")


def _verify(args: argparse.Namespace, _) -> None:
    from sicot_jax.index.storage import layout
    from sicot_jax.indexing.verify import verify

    folder = layout.current_version(args.index)
    if faults := verify(folder, checksums=True):
        raise InputError(f"{folder}: {'; '.join(faults)}; build the index again")
    print(f"{folder}: whole")


def _rank(args: argparse.Namespace, _) -> None:
    from sicot_jax.indexing.fit_ranker import rank

    print(rank(args.index, args.events, args.queries))


def _export(args: argparse.Namespace, _) -> None:
    from sicot_jax.indexing.parquet import export_index

    counts = export_index(args.index, args.out)
    print(f"wrote {args.out}: {counts['products']} products, {counts['photos']} photos")


def _publish(args: argparse.Namespace, _) -> None:
    from sicot_jax.index.backends.open import publish

    print(publish(args.index, args.database))


def _split(args: argparse.Namespace, _) -> None:
    from sicot_jax.index.backends.sharded import split

    print(
        f"{split(args.index, args.out, args.shards)}: {args.shards} shards; sicot serve --index {args.out}"
    )


def _import(args: argparse.Namespace, _) -> None:
    from sicot_jax.indexing.parquet import import_index

    print(f"{import_index(args.source, args.index)} is in use")


def _nightly(args: argparse.Namespace, _) -> None:
    from sicot_jax.indexing.nightly import nightly

    places = args.manifest, args.catalog, args.workdir, args.index
    print(nightly(*places, database=args.database, report=args.report).summary())
