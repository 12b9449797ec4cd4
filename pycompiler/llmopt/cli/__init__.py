"""The command line: `llmopt info | demo | bench | eval | explain | tune | build`; a command is a file: `add`, `run`.

Exit codes: 0 done, 1 failed (one line says why; LLMOPT_DEBUG=1 shows the traceback), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

from llmopt import settings

DONE, FAILED, INTERRUPTED = 0, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    logging.basicConfig(format="llmopt: %(message)s", level=logging.WARNING)
    args = _parser().parse_args(argv)
    try:
        debug = settings.debug_level()
    except ValueError as error:
        return _fail(error)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("llmopt: interrupted", file=sys.stderr)
        return INTERRUPTED
    # the last place before the user: a sentence, unless a traceback was asked for
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(error)


def _parser() -> argparse.ArgumentParser:
    from llmopt.cli import bench, build, demo, eval, explain, info, tune

    parser = argparse.ArgumentParser(
        prog="llmopt",
        description="A torch.compile backend that runs transformers close to the machine's limit.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage; LLMOPT_DEBUG=1 shows tracebacks",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (info, demo, bench, eval, explain, tune, build):
        command.add(commands)
    return parser


def _fail(error: Exception) -> int:
    """One line: what is wrong, and where to look when it is not the user's to mend."""
    from llmopt.models.errors import ModelError, sentence

    expected = isinstance(error, ModelError | ValueError)
    hint = "" if expected else " (LLMOPT_DEBUG=1 shows where)"
    print(f"llmopt: error: {sentence(error).removeprefix('llmopt: ')}{hint}", file=sys.stderr)
    return FAILED
