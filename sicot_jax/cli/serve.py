"""The flags of `sicot serve`; nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sicot_jax.errors import InputError


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_serve)
    parser.add_argument("--index", type=Path, required=True, help="folder of sicot index build")
    parser.add_argument(
        "--database",
        default="",
        metavar="URL",
        help="read the index from its copy there (sicot index publish)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes; cores are divided among them, GPUs too: one each",
    )
    parser.add_argument("--engine", default="auto", help="auto (the faster one), onnx or jax")
    parser.add_argument(
        "--largest-batch", type=int, default=32, help="photos in one call of the engine"
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, help="maximum duration of a request, seconds"
    )
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=500.0,
        help="a photo that would wait longer for the engine is answered with 503",
    )
    parser.add_argument(
        "--photo-bytes", type=int, default=10_000_000, help="maximum size of a photo file"
    )
    parser.add_argument(
        "--photo-pixels", type=int, default=30_000_000, help="maximum pixels of a photo"
    )
    parser.add_argument(
        "--keys", type=Path, help="file of API keys (sicot serve-key); without it none is asked for"
    )
    parser.add_argument("--events", type=Path, help="SQLite file to keep events in")
    parser.add_argument(
        "--keep-queries",
        type=Path,
        metavar="DIR",
        help="keep query photos there; by default none is kept",
    )
    parser.add_argument(
        "--keep-days", type=int, default=30, help="days after which a kept photo is removed"
    )


def add_serve_key_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_serve_key)
    parser.add_argument("name", help="whose key it is")
    parser.add_argument(
        "--file", type=Path, required=True, help="file that the key's hash is added to"
    )


def _serve(args: argparse.Namespace, _) -> None:
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
        largest_batch=args.largest_batch,
        threads=max((os.cpu_count() or 1) // max(args.workers, 1), 1),
        timeout_seconds=args.timeout,
        max_wait_seconds=args.max_wait_ms / 1e3,
        limits=PhotoLimits(bytes=args.photo_bytes, pixels=args.photo_pixels),
        keys=str(args.keys or ""),
        events=str(args.events or ""),
        keep_queries=str(args.keep_queries or ""),
        keep_days=args.keep_days,
    )
    serve(settings, host=args.host, port=args.port, workers=args.workers)


def _serve_key(args: argparse.Namespace, _) -> None:
    from sicot_jax.serve.api_keys import add_api_key

    print(add_api_key(args.file, args.name))
    print(f"shown this once; its hash is in {args.file}. Send it as: Authorization: Bearer KEY")
