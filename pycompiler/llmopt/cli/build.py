"""`llmopt build MODEL --target cuda:90`: every GPU kernel a model's plans need, compiled with no GPU present."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llmopt.cli import options
from llmopt.cli.progress import working


def add(commands: Any) -> None:
    from llmopt.quant.schemes import SCHEMES

    parser = commands.add_parser(
        "build",
        help="compile a model's GPU kernels, with no GPU needed",
        description="Plans the model's calls for each target, cross-compiles every kernel of the plans, and writes "
        "them with a manifest of checksums, versions, registers, shared memory and instructions.",
    )
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument(
        "--target", required=True, type=options.names, metavar="TARGET,…", help="such as cuda:80,cuda:90,hip:gfx942"
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER")
    options.add_dtype(parser, "fp16")
    options.add_random_weights(parser)
    parser.add_argument(
        "--precision",
        default="exact",
        choices=("exact", *SCHEMES),
        help="what linears are rounded to, exact by default",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from llmopt.gpu.pack import build
    from llmopt.models import DTYPES, load
    from llmopt.target import gpu_target

    targets = [gpu_target(name) for name in args.target]
    if not targets:
        raise ValueError("llmopt: --target names no target")
    with working(f"{args.model}: loading"):
        loaded = load(args.model, DTYPES[args.dtype], args.random_weights)
    with working(f"{args.model}: planning") as task:
        plans = {}
        for name, target in zip(args.target, targets, strict=True):
            task.say(f"{args.model}: planning for {name}")
            plans[target] = _launches(loaded, name, args.precision)
        task.say(f"{args.model}: compiling kernels")
        manifest = build(args.output, plans, args.model)
    for target, entries in manifest["targets"].items():
        launches = sum(e["launches"] for e in entries)
        size = sum((args.output / e["file"]).stat().st_size for e in entries)
        print(f"{target}: {len(entries)} kernels for {launches} launches, {size / 1024:.0f} KiB")
        for entry in entries:
            r = entry["report"]
            found = ", ".join(f"{n} {what}" for what, n in r["instructions"].items() if n)
            print(
                f"  {r['kernel']:24s} {r['registers']:3d} registers, {r['shared']:6d} B shared; {found}"
            )
    print(f"written to {args.output}; nothing of it has run on a GPU")
    return 0


def _launches(loaded: Any, target: str, precision: str) -> list[Any]:
    """What one call of every phase launches: of a causal model a prefill and a decode step."""
    import torch

    from llmopt.benchmark.phases import inputs_of, phases_of
    from llmopt.gpu.executor import recording

    torch._dynamo.reset()
    compiled: Any = torch.compile(
        loaded.model, backend="llmopt", options={"target": target, "precision": precision}
    )
    phase = phases_of(loaded.kind, ())[0]
    inputs = inputs_of(loaded, phase)
    with torch.no_grad(), recording() as launches:
        if loaded.kind != "causal":
            compiled(**inputs)
        else:
            cache = compiled(**inputs, use_cache=True).past_key_values
            compiled(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True)
    if not launches:
        raise ValueError(f"llmopt: no kernel for {target} takes any part of this model")
    return launches
