"""`llmopt tune MODEL|SHAPE…`: measures how linears are best cut on this machine, and keeps it; tune_gpu.py for GPUs."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from llmopt.cli import options
from llmopt.cli.progress import working

_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)")


def add(commands: Any) -> None:
    from llmopt.models import DTYPES
    from llmopt.quant.schemes import SCHEMES

    parser = commands.add_parser(
        "tune",
        help="measure which config of each kernel is fastest here",
        description="Measures, for every linear of a model or for shapes, the kernel's own rules "
        "against the likeliest other ways to cut the work, and keeps what wins by 3 % twice. "
        "Compiled models use what is kept; see docs/tuning.md.",
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="MODEL|SHAPE",
        help=f"{options.MODEL_HELP}; or shapes MxNxK such as 512x576x1536: x [M,K] times a weight [N,K]",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="weights' type (default: fp32; fp16 for a GPU)",
    )
    options.add_random_weights(parser)
    options.add_threads(parser)
    parser.add_argument(
        "--precision",
        choices=("exact", *SCHEMES),
        default="exact",
        help="how the linears' weights are stored (default: exact)",
    )
    options.add_group(parser)
    parser.add_argument(
        "--phases",
        type=options.names,
        default=[],
        metavar="PHASE,…",
        help="which calls of the model: as in llmopt bench (default: all)",
    )
    parser.add_argument(
        "--budget",
        type=options.positive,
        metavar="MS",
        help="milliseconds a shape may take: more for long calls or a noisy machine (default: 60; 6000 on a GPU)",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure what was measured already, too"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="write a heat map of the gains"
    )
    parser.add_argument("--show", action="store_true", help="print what is kept")
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="write all that is kept to one file"
    )
    parser.add_argument(
        "--import",
        type=Path,
        metavar="FILE",
        dest="import_",
        help="add what another machine exported",
    )
    _add_gpu_options(parser)
    parser.set_defaults(run=run)


def _add_gpu_options(parser: argparse.ArgumentParser) -> None:
    gpus = parser.add_argument_group("GPUs")
    gpus.add_argument("--target", default="cpu", help="cpu, or a GPU such as cuda:90 or hip:gfx942")
    gpus.add_argument("--gpu", metavar="NAME", help="which GPU of the target, such as H200")
    gpus.add_argument(
        "--predict",
        action="store_true",
        help="keep what the model says about tiles on a GPU that is not here, marked as predicted; "
        "without MODEL or SHAPE, about what Llama-like and BERT-like models ask for",
    )
    gpus.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the predictions to a file instead"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from llmopt import settings
    from llmopt.target import target
    from llmopt.tune.lookup import database

    if args.plot and args.plot.suffix != ".png":
        raise ValueError(f"--plot {args.plot}: the picture is a .png")
    options.check_outputs(args.plot, args.export)
    if not (args.what or args.show or args.export or args.import_ or args.predict):
        raise ValueError("nothing to do: give a model, shapes, --show, --export or --import")
    if args.what and not settings.tuning():
        raise ValueError("LLMOPT_TUNE=0: nothing that is measured would be used")
    options.compile_options(args)  # raises where they do not go together
    is_gpu = args.target != "cpu"
    if not is_gpu and (args.gpu or args.predict or args.output):
        raise ValueError("--gpu, --predict and -o are for a GPU: add --target, such as cuda:90")
    if is_gpu and (args.plot or args.threads):
        raise ValueError("--plot and --threads are for the CPU")
    args.dtype = args.dtype or ("fp16" if is_gpu else "fp32")
    if is_gpu:
        from llmopt.cli import tune_gpu

        if args.import_:
            _import(database(target(), torch.get_num_threads()), args.import_)
        return tune_gpu.run(args)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    known = database(target(), torch.get_num_threads())
    if args.import_:
        _import(known, args.import_)
    if args.what:
        _tune(args, known)
    if args.export:
        export(known, args.export)
    if args.show:
        _show(known)
    return 0


def export(known: Any, path: Path) -> None:
    """Writes all that is kept on this machine, for whatever device, and says how much of it nobody measured."""
    from llmopt.gpu.tune.environment import is_predicted
    from llmopt.tune.database import Database, Entry, environments
    from llmopt.tune.exchange import export_file

    count = export_file(known.root, path)
    guesses = [Database(known.root, e) for e, _ in environments(known.root) if is_predicted(e)]
    predicted = sum(isinstance(entry, Entry) for kept in guesses for _, entry in kept.files())
    what = (
        f"{count} entries, {predicted} of them predicted," if predicted else f"{count} measurements"
    )
    print(f"{what} written to {path}")


def _tune(args: argparse.Namespace, known: Any) -> None:
    from llmopt.target import target
    from llmopt.tune.heatmap import heatmap
    from llmopt.tune.lookup import Lookup
    from llmopt.tune.search import BUDGET_SECONDS
    from llmopt.tune.tuning import Tuning

    problems = _problems(args)
    lookup = Lookup(target(), known)
    budget = args.budget / 1e3 if args.budget else BUDGET_SECONDS
    tuning = Tuning(target(), known.environment, budget)
    rows = []
    shapes = "1 shape" if len(problems) == 1 else f"{len(problems)} shapes"
    with working(f"measuring {shapes}", total=len(problems)) as task:
        for problem in problems:
            task.say(str(problem))
            entry, _ = lookup.entry(problem)
            source = "kept"
            if entry is None or args.again:
                source = "tuned"
                entry = lookup.keep(*tuning.measure(problem))
            rows.append((entry, source if entry.config else f"default ({entry.reason})"))
            task.advance()
    _print(f"{target()}, {dict(known.environment.facts)['threads']} threads", rows)
    if any("too few fit" in entry.reason for entry, _ in rows):
        print(f"--budget gives a shape more than {budget * 1e3:.0f} ms")
    if args.plot:
        title = f"{' '.join(args.what)} {args.dtype} {args.precision} — {target()}"
        heatmap(args.plot, [entry for entry, _ in rows], title)


def _problems(args: argparse.Namespace) -> list[Any]:
    """The shapes asked for, or those of the model's linears, at the heights that are measured."""
    from llmopt.tune.lookup import at, bucket

    shapes = parse_shapes(args.what)
    problems = [_of_shape(args, *shape) for shape in shapes] if shapes else _of_model(args)
    sized = [at(p, bucket(p.m or p.hint)) for p in problems if p.n and p.k and (p.m or p.hint)]
    return list(dict.fromkeys(sized))


def parse_shapes(what: list[str]) -> list[tuple[int, int, int]]:
    """The shapes MxNxK among the arguments; none where they are one model. Raises ValueError for anything else."""
    shapes = [_SHAPE.fullmatch(text) for text in what]
    if any(shapes):
        if not all(shapes):
            raise ValueError("give either shapes MxNxK or one model")
        return [(int(s[1]), int(s[2]), int(s[3])) for s in shapes if s]
    if what and what[0][:1].isdigit() and not Path(what[0]).exists():
        raise ValueError(f"{what[0]!r} is no shape: expected MxNxK such as 512x576x1536")
    if len(what) != 1:
        raise ValueError(f"one model at a time, not {len(what)}: {', '.join(what)}")
    return []


def _of_shape(args: argparse.Namespace, m: int, n: int, k: int) -> Any:
    from llmopt.models import DTYPES
    from llmopt.native.linear_quantized import PLANES
    from llmopt.native.segment import SHORT_DTYPES
    from llmopt.options import parse_options
    from llmopt.types import LinearProblem

    dtype = SHORT_DTYPES[DTYPES[args.dtype]]
    scheme = parse_options(None, options.compile_options(args)).scheme
    if scheme is None:
        return LinearProblem("linear", m, n, k, dtype, dtype, dtype)
    if reason := scheme.reject(k):
        raise ValueError(f"{m}x{n}x{k}: {reason}")
    return LinearProblem(
        "linear_quantized",
        m,
        n,
        k,
        dtype,
        f"q{scheme.bits}",
        dtype,
        group=scheme.group_of(k),
        offsets=not scheme.symmetric,
        planes=PLANES[scheme.activations],
    )


def _of_model(args: argparse.Namespace) -> list[Any]:
    """The linears of every plan that the model's phases make."""
    import torch

    from llmopt.benchmark.phases import call_inputs, phases_of
    from llmopt.models import DTYPES, load
    from llmopt.tune.lookup import recording

    (name,) = args.what
    with working(f"{name}: loading"):
        loaded = load(name, DTYPES[args.dtype], args.random_weights)
    chosen = options.compile_options(args)
    with working(f"{name}: finding its linears") as task, torch.inference_mode():
        compiled: Any = torch.compile(loaded.model, backend="llmopt", options=chosen)
        with recording() as found:
            for phase in phases_of(loaded.kind, args.phases):
                task.say(f"{name}: {phase.describe()}")
                compiled(**call_inputs(compiled, loaded, phase))
        return list(found)


def _print(title: str, rows: list[Any]) -> None:
    """A table of (entry, source)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for heading in ("shape", "fused"):
        table.add_column(heading)
    for heading in ("default us", "best us", "gain", "% of roof"):
        table.add_column(heading, justify="right")
    for heading in ("config", "source"):
        table.add_column(heading, overflow="fold")
    for entry, source in rows:
        p = entry.problem
        group = f"/{p['group']}" if p.get("group") else ""
        gain = entry.default_us / entry.us if entry.us else 1.0
        words = [str(p[name]) for name in ("norm", "act") if p.get(name, "none") != "none"]
        words += [name for name in ("bias", "gated", "residual") if p.get(name)]
        table.add_row(
            f"{p['m']}x{p['n']}x{p['k']} {p['x']}·{p['w']}{group}",
            "+".join(words),
            f"{entry.default_us:.1f}",
            f"{entry.us:.1f}",
            f"{gain:.2f}×" if entry.config else "",
            f"{entry.roof:.0%}",
            " ".join(f"{name}={value}" for name, value in entry.config.items()),
            source,
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _show(known: Any) -> None:
    from llmopt.tune.database import Entry, environments

    files = list(known.files())
    rows = [
        (e, "tuned" if e.config else f"default ({e.reason})")
        for _, e in files
        if isinstance(e, Entry)
    ]
    print(f"here: {known.environment}\n{known.folder}")
    if rows:
        _print(f"{len(rows)} measurements", rows)
    else:
        print("nothing was measured in this environment")
    for path, reason in files:
        if isinstance(reason, str):
            print(f"{path.name}: {reason}")
    for environment, count in environments(known.root):
        if environment != known.environment:
            print(f"elsewhere: {count} measurements; {known.environment.difference(environment)}")


def _import(known: Any, path: Path) -> None:
    from llmopt.tune.exchange import import_file

    for found in import_file(known.root, path):
        here = found.environment == known.environment
        used = "" if here else f"; not used here: {known.environment.difference(found.environment)}"
        print(f"{found.added} measurements added, {found.kept} were there already{used}")
        for reason in found.unusable:
            print(f"one left out: {reason}")
