"""`llmopt tune … --target cuda:90`: measures tiles of GPU kernels where the GPU is, or writes down what the model predicts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from llmopt.cli import options
from llmopt.cli.progress import working


def run(args: argparse.Namespace) -> int:
    from llmopt import kernels
    from llmopt.cli.tune import export
    from llmopt.gpu.tune.lookup import database, local, predictions
    from llmopt.gpus import stand_in

    target = _target(args)
    kernels.load()
    here = local(target)
    if args.output and not args.predict:
        raise ValueError(f"-o {args.output} is for --predict; --export writes what was measured")
    if args.what and not args.predict and here is None:
        raise ValueError(_missing(args, target))
    if args.predict:
        known = predictions(stand_in(target))
        _predict(args, target, known)
    elif here is None:
        known = predictions(stand_in(target))
    else:
        device, target = here
        known = database(target, device)
        _measure(args, target, device, known)
    if args.export:
        export(known, args.export)
    if args.show:
        show(known)
    return 0


def _target(args: argparse.Namespace) -> Any:
    from llmopt.gpus import part_named
    from llmopt.target import gpu_target

    target = gpu_target(args.target)
    if args.gpu is None:
        return target
    part = part_named(args.gpu)
    if part.target.tier != target.tier:
        raise ValueError(f"--gpu {args.gpu} is a {part.target}, not the {target} of --target")
    return part.target


def _missing(args: argparse.Namespace, target: Any) -> str:
    """What is missing for measuring."""
    import torch

    build = f"torch {torch.__version__} sees no GPU"
    if torch.cuda.is_available():
        build = f"torch sees {torch.cuda.get_device_name()}"
    return (
        f"no GPU of {target} is here to measure on: {build}. --predict keeps what the model says about "
        f"{args.gpu or target.name} instead; nothing of that is measured"
    )


def _predict(args: argparse.Namespace, target: Any, known: Any) -> None:
    from llmopt.gpu.tune.predict import predict_all, standard_problems, write
    from llmopt.gpus import part_of

    part = part_of(target)
    assert part is not None
    asked = problems(args) if args.what else list(standard_problems())
    with working(f"predicting {len(asked)} problems", total=len(asked)) as task:

        def said(text: str) -> None:
            task.say(text)
            task.advance()

        entries, left_out = predict_all(asked, part, said)
    for reason in dict.fromkeys(left_out):
        print(f"left out: {reason}")
    if args.output:
        write(args.output, part, entries)
        print(f"{len(entries)} predictions for {part.name} written to {args.output}")
        return
    for entry in entries:
        known.put(entry)
    print_table(f"{part.name} ({target}): predicted, never measured", entries)


def _measure(args: argparse.Namespace, target: Any, device: Any, known: Any) -> None:
    from llmopt.gpu.tune.lookup import Lookup
    from llmopt.gpu.tune.tuning import BUDGET_SECONDS, Tuning
    from llmopt.registry import possible

    asked = problems(args) if args.what else []
    budget = args.budget / 1e3 if args.budget else BUDGET_SECONDS
    lookup, tuning = Lookup(target, known), Tuning(target, device, budget)
    rows = []
    with working(f"measuring {len(asked)} problems", total=len(asked)) as task:
        for a in asked:
            task.say(str(a.problem))
            for kernel in possible(a.op, a.problem, target):
                entry, _ = lookup.entry(kernel, a.problem)
                if entry is None or args.again:
                    entry = lookup.keep(*tuning.measure(kernel, a.problem))
                rows.append(entry)
            task.advance()
    if rows:
        print_table(f"{dict(known.environment.facts)['name']} ({target}): measured", rows)


def problems(args: argparse.Namespace) -> list[Any]:
    """What was asked for, in the buckets that are measured: shapes, or all that a model's plans launch."""
    from llmopt.cli.tune import parse_shapes

    shapes = parse_shapes(args.what)
    if shapes:
        return list(dict.fromkeys(_of_shape(args, *shape) for shape in shapes))
    return _of_model(args)


def _of_shape(args: argparse.Namespace, m: int, n: int, k: int) -> Any:
    from llmopt.gpu.tune.problems import Asked, bucketed
    from llmopt.kernels.operands import dtype_name
    from llmopt.launch import LinearProblem
    from llmopt.models import DTYPES
    from llmopt.options import parse_options

    scheme = parse_options(None, options.compile_options(args)).scheme
    op, name, group = "linear", "f16", 0
    if scheme is not None:
        if reason := scheme.reject(k):
            raise ValueError(f"{m}x{n}x{k}: {reason}")
        op, name, group = "linear_quantized", scheme.name, scheme.group_of(k)
    offsets = scheme is not None and not scheme.symmetric
    dtype = dtype_name(DTYPES[args.dtype])
    problem = bucketed(LinearProblem(m, n, k, dtype, name, group % k, offsets=offsets))
    assert problem is not None
    return Asked(op, problem)


def _of_model(args: argparse.Namespace) -> list[Any]:
    import torch

    from llmopt.benchmark.phases import call_inputs, phases_of
    from llmopt.gpu import executor
    from llmopt.gpu.tune.lookup import recording
    from llmopt.models import DTYPES, load

    (name,) = args.what
    with working(f"{name}: loading"):
        loaded = load(name, DTYPES[args.dtype], args.random_weights)
    chosen = {**options.compile_options(args), "target": args.target}
    with working(f"{name}: finding its launches") as task, torch.inference_mode():
        compiled: Any = torch.compile(loaded.model, backend="llmopt", options=chosen)
        with recording() as found, executor.recording():
            for phase in phases_of(loaded.kind, args.phases):
                task.say(f"{name}: {phase.describe()}")
                compiled(**call_inputs(compiled, loaded, phase))
    return list(found)


def print_table(title: str, entries: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    table.add_column("problem")
    for heading in ("default us", "best us", "% of roof"):
        table.add_column(heading, justify="right")
    for heading in ("tile", "why"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        config = " ".join(f"{name}={value}" for name, value in entry.config.items())
        table.add_row(
            _words(entry.problem), f"{entry.default_us:.1f}", f"{entry.us:.1f}", f"{entry.roof:.0%}",
            config or "the kernel's own", entry.reason,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _words(problem: Any) -> str:
    """A problem in few words: its kernel and whatever is not zero or "none"."""
    hidden = ("kernel", "source")
    given = [
        f"{n}={v}" for n, v in problem.items() if n not in hidden and v not in (0, "none", "f16")
    ]
    return f"{problem['kernel']} {' '.join(given)}"


def show(known: Any) -> None:
    """What is kept for a GPU, and what else there is."""
    from llmopt.tune.database import Entry, environments

    print(f"{known.environment}\n{known.folder}")
    files = list(known.files())
    entries = [entry for _, entry in files if isinstance(entry, Entry)]
    if entries:
        print_table(f"{len(entries)} entries", entries)
    else:
        print("nothing is kept for this GPU")
    for path, reason in files:
        if isinstance(reason, str):
            print(f"{path.name}: {reason}")
    for environment, count in environments(known.root):
        if environment != known.environment:
            print(f"elsewhere: {count} entries; {known.environment.difference(environment)}")
