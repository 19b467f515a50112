"""`sicot serve` and `sicot serve-key`: recognition over HTTP."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.cli.options import add_command
from sicot_jax.errors import InputError

if TYPE_CHECKING:
    from sicot_jax.cli.options import Commands


def add_serve_commands(commands: Commands) -> None:
    """Adds `sicot serve` and `sicot serve-key`.

    Args:
      commands: sub-parsers object that the command is added to.
    """
    parser = add_command(
        commands, "serve", _serve, "recognise photos over HTTP, with a page to try it"
    )
    parser.add_argument("--index", type=Path, required=True, help="folder of sicot index build")
    parser.add_argument(
        "--database",
        default="",
        metavar="URL",
        help="database to read the index from (see sicot index publish)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PREFIX",
        help="prefix under which a proxy offers the service, such as /find (default: none)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes; cores are divided among them, and each gets one GPU (default: 1)",
    )
    _add_request_options(parser)
    _add_record_options(parser)

    parser = add_command(
        commands, "serve-key", _serve_key, "make an API key for sicot serve --keys"
    )
    parser.add_argument("name", help="holder of the key")
    parser.add_argument(
        "--file", type=Path, required=True, help="file that the key's hash is added to"
    )


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", default="auto", help="onnx, jax or auto, the faster one (default: auto)"
    )
    parser.add_argument(
        "--require-gpu",
        action="store_true",
        help="do not start where the engine would run on the CPU",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=32,
        help="most photos in one call of the engine (default: 32)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        help="longest duration of a request in seconds (default: 10)",
    )
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=500.0,
        help="answer 503 where a photo would wait longer, in all stages together (default: 500)",
    )
    parser.add_argument(
        "--max-photo-bytes",
        type=int,
        default=10_000_000,
        help="largest photo file (default: 10000000)",
    )
    parser.add_argument(
        "--max-photo-pixels",
        type=int,
        default=30_000_000,
        help="most pixels of a photo (default: 30000000)",
    )
    parser.add_argument(
        "--keys", type=Path, help="file of API keys (see sicot serve-key); default: none needed"
    )


def _add_record_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", type=Path, help="SQLite file to record events in")
    parser.add_argument(
        "--keep-queries",
        type=Path,
        metavar="DIR",
        help="folder to keep query photos in; default: none is kept",
    )
    parser.add_argument(
        "--keep-days",
        type=int,
        default=30,
        help="days after which a query photo is removed (default: 30)",
    )


def _serve(args: argparse.Namespace, _: Sequence[str]) -> None:
    try:
        from sicot_jax.serve.server import serve
    except ImportError as error:
        raise InputError(
            f"no {error.name} here to serve with; install it: pip install 'sicot_jax[service]'"
        ) from error
    from sicot_jax.serve.photo import PhotoLimits
    from sicot_jax.serve.settings import ServiceSettings

    settings = ServiceSettings(
        index=str(args.index),
        database=args.database,
        engine=args.engine,
        require_gpu=args.require_gpu,
        max_batch=args.max_batch,
        threads=max((os.cpu_count() or 1) // max(args.workers, 1), 1),
        timeout_seconds=args.timeout,
        max_wait_seconds=args.max_wait_ms / 1e3,
        limits=PhotoLimits(bytes=args.max_photo_bytes, pixels=args.max_photo_pixels),
        keys=str(args.keys or ""),
        events=str(args.events or ""),
        keep_queries=str(args.keep_queries or ""),
        keep_days=args.keep_days,
        root_path=args.root_path.rstrip("/"),
    )
    serve(settings, host=args.host, port=args.port, workers=args.workers)


def _serve_key(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.serve.api_keys import add_api_key

    print(add_api_key(args.file, args.name))
    print(f"shown this once; its hash is in {args.file}. Send it as: Authorization: Bearer KEY")
