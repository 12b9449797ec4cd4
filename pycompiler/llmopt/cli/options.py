"""Options that several commands share, and their checks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

MODEL_HELP = (
    "smollm2, minilm, path.py:function, or a folder written by save_pretrained or save_quantized"
)


def check_outputs(*paths: Path | None) -> None:
    """Before minutes of work: raises ValueError for a file that cannot be written where it is wanted."""
    for path in paths:
        if path is not None and path.is_dir():
            raise ValueError(f"{path} is a folder: a file is written there")
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")


def add_dtype(parser: argparse.ArgumentParser, default: str = "fp32") -> None:
    from llmopt.models import DTYPES

    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default=default,
        help=f"weights' type (default: {default})",
    )


def add_random_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="the architecture alone with seeded random weights: needs no model package",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=positive, help="threads (default: what torch takes by itself)"
    )


def add_group(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group", type=_group, help="channel, 32, 64 or 128")


def compile_options(args: argparse.Namespace) -> dict[str, Any]:
    """What --precision and --group ask torch.compile for; raises ValueError, before a model is loaded, where they do not go together."""
    from llmopt.options import parse_options

    chosen = {"precision": args.precision}
    if args.group is not None:
        chosen["group"] = args.group
    parse_options(None, chosen)
    return chosen


def _group(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def names(text: str) -> list[str]:
    """An argparse type: comma-separated names, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
