"""The sub-commands of `sicot index`; nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def kind(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = kind("build", _build, "a finished run and its catalogue's photos, as the next version of an index")
    sub.add_argument("--workdir", type=Path, required=True, help="run folder")
    sub.add_argument(
        "--out", type=Path, required=True, help="the index; its version in use is replaced when the new one is whole"
    )
    sub.add_argument("--path", default="", help="where the run's catalogue is now, if it was moved")
    sub.add_argument("--bits", type=int, default=256, help="of a photo's code (default: 256)")


def _build(args: argparse.Namespace, _) -> None:
    from sicot_jax.index.build import build

    print(f"{build(args.workdir, args.out, path=args.path, bits=args.bits)} is in use: sicot serve --index {args.out}")
