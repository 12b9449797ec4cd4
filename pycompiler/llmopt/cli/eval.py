"""`llmopt eval MODEL`: what a scheme costs in accuracy, on a text that comes with Python."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmopt.cli import options
from llmopt.cli.progress import Task, working

WINDOW = 512
BATCH = 4
CALIBRATION_WINDOWS = 8
TEXTS = 512  # of an embedding model, at most
TEXT_TOKENS = 64  # what one of these texts counts for --tokens


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity, divergence and agreement of quantised models",
        description="Compares quantised twins of a model with the model itself in fp32, on Python's own documentation: causal "
        "models by perplexity, KL divergence and agreement on the next token in windows of 512 tokens, encoders by the cosine of "
        "their embeddings. Calibration samples come from the end of the text, which is not measured on.",
    )
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument(
        "--scheme",
        type=options.names,
        default=[],
        metavar="SCHEME,…",
        help="w8a8, w8a16, w4a16, w4a8, auto, run in eager from their reference; gguf: smollm2's own 4-bit codes",
    )
    parser.add_argument(
        "--precision",
        type=options.names,
        default=[],
        metavar="PRECISION,…",
        help="w8a8, w8a16, w4a16, w4a8, auto: compile options, run through torch.compile",
    )
    parser.add_argument(
        "--kv-cache",
        type=options.names,
        default=[],
        metavar="KV",
        help="int8: a causal model with llmopt.KVCache, in eager; what is asked for with --scheme has it on top",
    )
    parser.add_argument(
        "--algorithm",
        help="with --scheme: round (default), smoothquant, awq, gptq, smoothquant+gptq, awq+gptq",
    )
    options.add_group(parser)
    parser.add_argument(
        "--tokens", type=options.positive, default=20480, metavar="N", help="default: 20480"
    )
    options.add_random_weights(parser)
    options.add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from llmopt.models import ModelError, load
    from llmopt.quant.schemes import SCHEMES

    if not args.scheme and not args.precision and not args.kv_cache:
        raise ValueError(
            "say what to measure: --scheme w8a8,w8a16,w4a16, --precision w8a8 or --kv-cache int8"
        )
    options.check_outputs(args.json)
    if args.precision and args.algorithm is not None:
        raise ValueError("--algorithm is for --scheme: measure --precision apart")
    grouped = [*args.scheme, *args.precision]
    if args.group is not None and (not grouped or set(grouped) - set(SCHEMES)):
        raise ValueError(
            f"--group is for {', '.join(SCHEMES)}: measure {', '.join(sorted(set(grouped) - set(SCHEMES)) or args.kv_cache)} apart"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    with working(f"{args.model}: loading"):
        loaded = load(args.model, torch.float32, args.random_weights)
    if loaded.kind == "causal":
        result = _causal(args, loaded)
    elif args.kv_cache:
        raise ModelError(f"{args.model}: only language models have a KV cache")
    elif loaded.kind == "encoder" and loaded.tokenizer is not None:
        result = _encoder(args, loaded)
    else:
        raise ModelError(
            f"{args.model}: only language models and encoders with a tokenizer can be measured"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    _print(result)
    return 0


def _causal(args: argparse.Namespace, loaded: Any) -> dict[str, Any]:
    from llmopt.models.text import documentation
    from llmopt.quant.evaluate import compare_causal, windows_of

    text = documentation()
    ids = _ids(loaded.tokenizer, text.content, loaded.model.config.vocab_size)
    length = min(WINDOW, _positions(loaded.model.config))
    kept_back = CALIBRATION_WINDOWS * length
    if len(ids) < kept_back + length:
        raise ValueError(
            f"the text has {len(ids)} tokens: {kept_back} for calibration and {length} to measure are needed"
        )
    windows = windows_of(ids[:-kept_back], length, args.tokens)
    samples = [{"input_ids": w[None]} for w in ids[-kept_back:].view(-1, length)]
    models = _models(args, loaded, samples)
    steps = (1 + len(models)) * -(-len(windows) // BATCH)
    with working(f"{args.model}: {windows.numel()} tokens", total=steps) as task:
        found = compare_causal(loaded.model, models, windows, BATCH, task.advance)
    return _result(args, text.name, found)


def _encoder(args: argparse.Namespace, loaded: Any) -> dict[str, Any]:
    import torch

    from llmopt.models.minilm import embed
    from llmopt.models.text import documentation, paragraphs
    from llmopt.quant.evaluate import compare_embeddings

    text = documentation()
    parts = paragraphs(text)
    kept_back = CALIBRATION_WINDOWS * 8
    if len(parts) <= kept_back:
        raise ValueError(
            f"the text has {len(parts)} paragraphs: {kept_back} for calibration and 1 to measure are needed"
        )
    texts = parts[: min(TEXTS, max(1, args.tokens // TEXT_TOKENS), len(parts) - kept_back)]
    calibration = parts[-kept_back:]
    samples = [
        dict(loaded.tokenizer(calibration[i : i + 8], padding=True, truncation=True,
                              max_length=256, return_tensors="pt"))
        for i in range(0, kept_back, 8)
    ]  # fmt: skip
    models = _models(args, loaded, samples)
    batches = [texts[i : i + 16] for i in range(0, len(texts), 16)]

    def embeddings(model: Any, task: Task) -> Any:
        rows = []
        for batch in batches:
            rows.append(embed(model, loaded.tokenizer, batch))
            task.advance()
        return torch.cat(rows)

    total = (1 + len(models)) * len(batches)
    with working(f"{args.model}: {len(texts)} texts", total=total) as task:
        wanted = embeddings(loaded.model, task)
        found = {
            name: compare_embeddings(wanted, embeddings(model, task))
            for name, model in models.items()
        }
    return _result(args, text.name, found)


def _positions(config: Any) -> int:
    """The longest text a model takes; WINDOW when its config does not say."""
    return getattr(config, "max_position_embeddings", None) or WINDOW


def _ids(tokenizer: Any, content: str, vocabulary: int) -> Any:
    """The text's tokens; without a tokenizer, its bytes."""
    import torch

    if tokenizer is None:
        return torch.tensor(list(content.encode())) % vocabulary
    return torch.tensor(tokenizer(content, verbose=False)["input_ids"])


def _models(
    args: argparse.Namespace, loaded: Any, samples: list[Any]
) -> Mapping[str, Callable[..., Any]]:
    import torch

    from llmopt import quantize
    from llmopt.quant.layers import twin_of

    models: dict[str, Callable[..., Any]] = {}
    for scheme in args.scheme:
        with working(f"{args.model}: {scheme}"):
            if scheme == "gguf":
                models[scheme] = _from_gguf(args)
                continue
            if scheme == "auto":
                models[scheme] = quantize(loaded.model, scheme, samples)
                continue
            algorithm = args.algorithm or "round"
            calibration = None if algorithm == "round" else samples
            models[f"{scheme} {algorithm}"] = quantize(
                loaded.model, scheme, calibration, group=args.group, algorithm=algorithm
            )
    for dtype in args.kv_cache:
        for name, model in (("", loaded.model), *tuple(models.items())):
            models[f"{name} + {dtype} KV".removeprefix(" + ")] = _with_cache(model, dtype)
    group = {} if args.group is None else {"group": args.group}
    for precision in args.precision:
        models[f"compiled {precision}"] = torch.compile(
            twin_of(loaded.model), backend="llmopt", options={"precision": precision, **group}
        )
    return models


def _with_cache(model: Any, dtype: str) -> Callable[..., Any]:
    """The model reading its keys and values from a cache of this dtype."""
    from llmopt.quant.kv_cache import KVCache

    KVCache(model, dtype)  # a wrong dtype is an error before anything is measured

    def call(input_ids: Any, use_cache: bool) -> Any:
        return model(input_ids=input_ids, past_key_values=KVCache(model, dtype), use_cache=True)

    return call


def _from_gguf(args: argparse.Namespace) -> Any:
    from llmopt.models import ModelError, smollm2

    if args.model != "smollm2" or args.random_weights:
        raise ModelError("--scheme gguf is for smollm2, whose package carries a GGUF file")
    return smollm2.load_quantized()[0].eval()


def _result(args: argparse.Namespace, text: str, found: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from llmopt import __version__

    return {
        "model": Path(args.model).name,
        "random_weights": args.random_weights,
        "text": text,
        "versions": {"llmopt": __version__, "torch": torch.__version__},
        "group": args.group,
        "results": {name: dataclasses.asdict(row) for name, row in found.items()},
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = result["results"]
    first = next(iter(rows.values()))
    table = Table(title=Text(f"{result['model']} beside itself in fp32\n{result['text']}"))
    table.add_column("")
    columns = _CAUSAL if "perplexity" in first else _EMBEDDINGS
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(form.format(row[key]) for _, key, form in columns))
    Console().print(table)


_CAUSAL = (
    ("tokens", "tokens", "{}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("change", "perplexity_change", "{:+.2%}"),
    ("KL", "divergence", "{:.4f}"),
    ("top-1 agreement", "top1", "{:.1%}"),
)
_EMBEDDINGS = (
    ("texts", "texts", "{}"),
    ("mean cosine", "mean_cosine", "{:.4f}"),
    ("lowest cosine", "lowest_cosine", "{:.4f}"),
)
