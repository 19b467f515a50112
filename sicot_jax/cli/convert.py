"""`sicot convert`: weights from PyTorch, and runs to PyTorch, ONNX and StableHLO."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicot_jax.cli.options import Handler, add_command, add_group, add_out_option

if TYPE_CHECKING:
    from sicot_jax.cli.options import Commands
    from sicot_jax.weights.parity import ParityReport


def add_convert_commands(commands: Commands) -> None:
    """Adds `sicot convert from-torch`, `to-torch`, `to-onnx` and `to-stablehlo`.

    Args:
      commands: sub-parsers object that the command is added to.
    """
    group = add_group(
        commands,
        "convert",
        "convert weights from PyTorch, or runs to PyTorch, ONNX and StableHLO, and compare outputs",
    )

    parser = add_command(
        group,
        "from-torch",
        _from_torch,
        "convert a ResNet's weights, for --config.model.init_from",
    )
    parser.add_argument(
        "path",
        type=Path,
        help=".safetensors, .pth, or a folder of to-torch, Hugging Face or timm",
    )
    add_out_option(parser, "folder")
    parser.add_argument("--stem", default="", help="half or small, for a 3x3 first convolution")
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="NAME",
        help="prefix of names of arrays that may be missing; can be repeated",
    )

    parser.add_argument(
        "--prefix",
        default="",
        help="what stands before the names of the ResNet to take, such as backbone.; needed where "
        "there are other arrays beside it",
    )

    def add_export(name: str, handler: Handler, description: str) -> argparse.ArgumentParser:
        parser = add_command(group, name, handler, description)
        parser.add_argument("--workdir", type=Path, required=True, help="run folder")
        add_out_option(parser, "folder")
        return parser

    parser = add_export("to-torch", _to_torch, "convert a finished run to plain PyTorch")
    parser.add_argument(
        "--with-text", action="store_true", help="include the semantic stream and its vocabulary"
    )
    parser = add_export("to-onnx", _to_onnx, "convert a finished run to an ONNX graph")
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="return the K best classes instead of logits",
    )
    add_export(
        "to-stablehlo",
        _to_stablehlo,
        "convert a finished run to a StableHLO program for CPU, CUDA and TPU",
    )


def _from_torch(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.export.from_torch import from_torch

    reports = from_torch(
        args.path,
        args.out,
        stem=args.stem,
        allow_missing=args.allow_missing,
        prefix=args.prefix,
    )
    _print_parity(args, reports)


def _to_torch(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.export.to_torch import to_torch

    _print_parity(args, to_torch(args.workdir, args.out, with_text=args.with_text))


def _to_onnx(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.export.to_onnx import to_onnx

    _print_parity(args, to_onnx(args.workdir, args.out, top_k=args.top_k))


def _to_stablehlo(args: argparse.Namespace, _: Sequence[str]) -> None:
    from sicot_jax.export.to_stablehlo import to_stablehlo

    _print_parity(args, to_stablehlo(args.workdir, args.out))


def _print_parity(args: argparse.Namespace, reports: Sequence[ParityReport]) -> None:
    from sicot_jax.weights.parity import parity_lines

    print("\n".join([*parity_lines(reports), f"wrote {args.out}"]))
