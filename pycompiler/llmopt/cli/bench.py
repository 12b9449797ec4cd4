"""`llmopt bench MODEL`: end-to-end speed against eager and peers, between machine probes."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from llmopt.cli import options
from llmopt.cli.progress import working

ROUNDS = 5


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="end-to-end speed against eager and peers",
        description="Runs each system in its own process, in interleaved rounds, with probes of "
        "the machine around each measurement. Causal models: prefill of 512 tokens, first token "
        "after 128, decode of 64 tokens after 128 (batch 1, a plain loop over forward with a KV "
        "cache). Encoders: batches such as 8x128. Anything else: its own example inputs. The outputs of every system are compared "
        "with the model's in fp32: KL divergence and agreement on the best token, or the cosine of embeddings.",
    )
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    options.add_dtype(parser)
    options.add_random_weights(parser)
    options.add_threads(parser)
    parser.add_argument(
        "--against",
        type=options.names,
        default=["eager"],
        metavar="SYSTEM,…",
        help="eager, inductor, inductor-freezing; llmopt-marked (by llmopt.mark_layers), "
        "llmopt-same-storage (weights as they are, though fewer bits hold them); "
        "llmopt-w8a8, llmopt-w8a8-channel, llmopt-w8a16, llmopt-w4a16, llmopt-w4a8, llmopt-auto; "
        "in 8 bits: torchao, torchao-w8a16, onnxruntime-int8, openvino-int8; onnxruntime, openvino; the GGUF of smollm2 as Q8_0, "
        "Q4_0 and F16: llama.cpp, llama.cpp-q4_0, llama.cpp-f16 (default: eager). What is not installed says how to install it",
    )
    parser.add_argument(
        "--phases",
        type=options.names,
        default=[],
        metavar="PHASE,…",
        help="prefill, first-token, decode (default: these); static-512, static-8192: decode in a static cache; for encoders "
        "BATCHxTOKENS (default: 8x128,1x128)",
    )
    parser.add_argument(
        "--repeat", type=options.positive, default=ROUNDS, metavar="N", help="rounds (default: 5)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON line a number")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a picture")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="put the table between this model's marks in FILE (made if it is not there)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from llmopt import settings
    from llmopt.benchmark import rounds
    from llmopt.benchmark.phases import phases_of
    from llmopt.benchmark.results import Setting, rows_of
    from llmopt.benchmark.systems import systems_of
    from llmopt.benchmark.worker import Job
    from llmopt.models import DTYPES, kind_of

    if args.plot and args.plot.suffix != ".png":
        raise ValueError(f"--plot {args.plot}: the picture is a .png")
    options.check_outputs(args.json, args.plot, args.markdown)
    systems = systems_of(args.against)
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    with working(f"{args.model}: looking at the model"):
        phases = phases_of(
            kind_of(args.model, DTYPES[args.dtype], args.random_weights), args.phases
        )

    def job(system: str) -> Job:
        return Job(
            system,
            args.model,
            args.dtype,
            threads,
            args.random_weights,
            debug=settings.debug_level() > 0,
        )

    with working("starting") as task:
        result = rounds.run(systems, phases, job, args.repeat, task.say)
    quantised = any(system.quantised for system in systems)
    setting = Setting(_short(args.model), args.dtype, threads, _command(args), quantised)
    rows = rows_of(result, phases)
    _write(args, rows, setting)
    _print(rows, setting)
    _print_accuracy(result)
    for name, reason in result.failures.items():
        print(f"llmopt: {name} failed: {reason}", file=sys.stderr)
    return 1 if result.failures else 0


def _short(model: str) -> str:
    """A function or folder by its last part: paths are nobody else's business."""
    return model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _command(args: argparse.Namespace) -> str:
    """What makes the numbers again; a model beneath the working directory keeps its path."""
    is_beneath = not Path(args.model).is_absolute() and ".." not in Path(args.model).parts
    model = args.model if is_beneath else _short(args.model)
    words = ["llmopt", "bench", model, "--dtype", args.dtype]
    words += ["--against", ",".join(args.against)]
    if args.phases:
        words += ["--phases", ",".join(args.phases)]
    if args.repeat != ROUNDS:
        words += ["--repeat", str(args.repeat)]
    if args.random_weights:
        words.append("--random-weights")
    return shlex.join(words)


def _write(args: argparse.Namespace, rows: Any, setting: Any) -> None:
    from llmopt.benchmark import plot, results

    if args.json:
        args.json.write_text(results.json_lines(rows, setting))
    if args.markdown:
        results.write_markdown(args.markdown, results.markdown(rows, setting), setting)
    if args.plot:
        plot.plot(args.plot, rows, setting)


def _print(rows: Any, setting: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from llmopt.benchmark.results import number

    table = Table(title=Text(f"{setting.title}\n{setting.machine()}"))
    for heading in ("phase", "system"):
        table.add_column(heading)
    for heading in ("value", "× eager", "% of roof", "FMA GFLOP/s", "read GB/s", "steady rounds"):
        table.add_column(heading, justify="right")
    last = ""
    for row in rows:
        if row.phase != last:
            table.add_section()
        table.add_row(
            row.title if row.phase != last else "",
            row.system,
            f"{number(row.value)} {row.unit}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.of_bound is None else f"{row.of_bound:.0%}",
            "" if row.probe is None else f"{row.probe.fma_flops / 1e9:.0f}",
            "" if row.probe is None else f"{row.probe.read_bytes / 1e9:.1f}",
            f"{row.steady} of {row.rounds}" if row.rounds else "",
        )
        last = row.phase
    _console().print(table)


def _print_accuracy(result: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from llmopt.benchmark.results import accuracy_columns, samples_of

    found = result.accuracy
    columns = accuracy_columns(found.values())
    table = Table("system", title=Text(f"Outputs.{samples_of(found.values())}"))
    for heading in (*(title for title, _ in columns), "largest difference from eager's"):
        table.add_column(heading, justify="right")
    for system in result.systems:
        difference = result.difference.get(system)
        cells = [text(found.get(system)) for _, text in columns]
        table.add_row(system, *cells, "–" if difference is None else f"{difference:.1e}")
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)
