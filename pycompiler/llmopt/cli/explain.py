"""`llmopt explain MODEL`: what llmopt did with a model, layer by layer, and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llmopt.cli import options
from llmopt.cli.progress import working
from llmopt.options import PRECISIONS


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="what llmopt did with a model, and why",
        description="Compiles the model, runs it, and tells per layer the kernel, the time and the "
        "share of the measured roof, what fell back to PyTorch and why, and where compile "
        "time went.",
    )
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    options.add_dtype(parser)
    options.add_random_weights(parser)
    options.add_threads(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="exact",
        help="the compile option (default: exact)",
    )
    options.add_group(parser)
    parser.add_argument(
        "--phase",
        metavar="PHASE",
        help="prefill (default), first-token or decode of a causal model; an encoder's 8x128",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one HTML file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    import llmopt
    from llmopt.benchmark.phases import call_inputs, phases_of
    from llmopt.models import DTYPES, load

    chosen = options.compile_options(args)
    options.check_outputs(args.html, args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    with working(f"{args.model}: loading"):
        loaded = load(args.model, DTYPES[args.dtype], args.random_weights)
    phase = phases_of(loaded.kind, [args.phase] if args.phase else ())[0]
    with torch.inference_mode(), working(f"{args.model}: compiling and measuring") as task:
        compiled: Any = torch.compile(loaded.model, backend="llmopt", options=chosen)
        inputs = call_inputs(compiled, loaded, phase)
        task.say(f"{args.model}: measuring {phase.describe()}")
        report = llmopt.explain(compiled, **inputs)
    print(report)
    if args.html:
        report.to_html(args.html)
    if args.json:
        report.to_json(args.json)
    return 0
