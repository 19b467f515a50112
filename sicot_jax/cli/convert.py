"""The sub-commands of `sicot convert`; nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    def kind(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--out", type=Path, required=True, help="folder to write, which must not exist"
        )
        return sub

    sub = kind("from-torch", _from_torch, "a ResNet's weights, for --config.model.init_from")
    sub.add_argument("path", type=Path, help=".safetensors, .pth, or a folder of to-torch")
    sub.add_argument("--stem", default="", help="half or small, for a 3x3 first convolution")
    sub.add_argument(
        "--may-miss",
        action="append",
        default=[],
        metavar="NAME",
        help="beginning of names of arrays that need not be there; as often as needed",
    )

    sub = kind("to-torch", _to_torch, "a finished run's recogniser, for plain PyTorch")
    sub.add_argument("--workdir", type=Path, required=True, help="run folder")
    sub.add_argument(
        "--with-text", action="store_true", help="the semantic stream and its vocabulary too"
    )

    sub = kind("to-onnx", _to_onnx, "a finished run's recogniser as an ONNX graph")
    sub.add_argument("--workdir", type=Path, required=True, help="run folder")
    sub.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="the K best classes inside the graph; default: logits",
    )

    sub = kind(
        "to-stablehlo",
        _to_stablehlo,
        "a finished run's recogniser as a program for CPU, CUDA and TPU",
    )
    sub.add_argument("--workdir", type=Path, required=True, help="run folder")


def _from_torch(args: argparse.Namespace, _) -> None:
    from sicot_jax.export.from_torch import from_torch

    _say(args, from_torch(args.path, args.out, stem=args.stem, may_be_missing=args.may_miss))


def _to_torch(args: argparse.Namespace, _) -> None:
    from sicot_jax.export.to_torch import to_torch

    _say(args, to_torch(args.workdir, args.out, with_text=args.with_text))


def _to_onnx(args: argparse.Namespace, _) -> None:
    from sicot_jax.export.to_onnx import to_onnx

    _say(args, to_onnx(args.workdir, args.out, top_k=args.top_k))


def _to_stablehlo(args: argparse.Namespace, _) -> None:
    from sicot_jax.export.to_stablehlo import to_stablehlo

    _say(args, to_stablehlo(args.workdir, args.out))


def _say(args: argparse.Namespace, proofs: dict[str, dict]) -> None:
    from sicot_jax.weights.parity import proof_lines

    print("\n".join([*proof_lines(proofs), f"wrote {args.out}"]))
