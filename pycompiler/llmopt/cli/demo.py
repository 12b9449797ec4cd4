"""`llmopt demo`: a real model generates text in eager and through llmopt, side by side."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.cli import options
from llmopt.cli.progress import working
from llmopt.models import DTYPES, LoadedModel, load

PROMPTS = (
    "Why is the sky blue? Explain it to a child.",
    "Write a short story about a robot who learns to paint.",
    "Give me a recipe for tomato soup, step by step.",
)
WARM_UP_TOKENS = 4


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="SmolLM2 generates text in eager and through llmopt, with times"
    )
    options.add_dtype(parser)
    options.add_random_weights(parser)
    parser.add_argument("--max-new-tokens", type=options.positive, default=64, metavar="N")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Generation:
    """One answer and its times."""

    tokens: list[int]
    first_seconds: float  # until the first new token
    rest_seconds: float  # for the tokens after it


class Stopwatch:
    """A `generate()` streamer that notes when tokens arrive: the prompt, then each new one."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._on_token = on_token

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self._on_token()

    def end(self) -> None:
        """Nothing is buffered."""


def run(args: argparse.Namespace) -> int:
    import llmopt

    with working("loading SmolLM2-135M-Instruct (the first time its weights are converted)"):
        loaded = load("smollm2", DTYPES[args.dtype], args.random_weights)
    model: Any = loaded.model
    inputs = [_encode(loaded, text) for text in args.prompts]

    with working("eager: warming up"):
        _generate(loaded, inputs[0], WARM_UP_TOKENS)
    eager = _generate_all("eager", loaded, inputs, args.max_new_tokens)
    model.compile(backend="llmopt")
    with working("llmopt: compiling"):
        compile_seconds = _warm_up(loaded, inputs)
    ours = _generate_all("llmopt", loaded, inputs, args.max_new_tokens)

    all_equal = True
    for text, a, b in zip(args.prompts, eager, ours, strict=True):
        all_equal &= _print_pair(loaded, text, a, b)
    _print_times(args.dtype, eager, ours, compile_seconds)
    with working("llmopt: explaining a call"), torch.inference_mode():
        summary = llmopt.explain(model, **inputs[0]).summary()
    print(summary)
    exact = args.dtype == "fp32" and not args.random_weights
    return 0 if all_equal or not exact else 1


def _encode(loaded: LoadedModel, text: str) -> dict[str, torch.Tensor]:
    """The chat prompt as model inputs; without a tokenizer, the text's bytes as token ids."""
    if loaded.tokenizer is None:
        ids = torch.tensor([list(text.encode())])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def _generate_all(
    system: str, loaded: LoadedModel, inputs: list[dict[str, torch.Tensor]], new: int
) -> list[Generation]:
    with working(f"{system}: generating", total=len(inputs) * (new + 1)) as task:
        return [_generate(loaded, one, new, task.advance) for one in inputs]


def _generate(
    loaded: LoadedModel,
    inputs: dict[str, torch.Tensor],
    new: int,
    on_token: Callable[[], None] = lambda: None,
) -> Generation:
    model: Any = loaded.model
    watch = Stopwatch(on_token)
    start = time.perf_counter()
    out = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, streamer=watch, pad_token_id=2
    )
    first, last = watch.times[1], watch.times[-1]
    return Generation(out[0, inputs["input_ids"].shape[1] :].tolist(), first - start, last - first)


def _warm_up(loaded: LoadedModel, inputs: list[dict[str, torch.Tensor]]) -> float:
    """Generates a little at every length, twice: what the first time cost beyond the second."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for one in inputs:
            _generate(loaded, one, WARM_UP_TOKENS)
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def _print_pair(loaded: LoadedModel, text: str, eager: Generation, ours: Generation) -> bool:
    print(f"\nprompt: {text}")
    for system, generation in (("eager", eager), ("llmopt", ours)):
        print(f"  {system}:")
        for line in _decode(loaded, generation.tokens).splitlines():
            print(f"    {line}")
    if eager.tokens == ours.tokens:
        print(f"  the same {len(ours.tokens)} tokens")
        return True
    pairs = itertools.zip_longest(eager.tokens, ours.tokens)
    where = next(i for i, (a, b) in enumerate(pairs) if a != b)
    print(f"  DIFFERENT from token {where + 1} on")
    return False


def _decode(loaded: LoadedModel, tokens: list[int]) -> str:
    if loaded.tokenizer is None:
        return "token ids " + " ".join(str(token) for token in tokens)
    return loaded.tokenizer.decode(tokens, skip_special_tokens=True)


def _print_times(
    dtype: str, eager: list[Generation], ours: list[Generation], compile_seconds: float
) -> None:
    rate = {name: _tokens_per_second(g) for name, g in (("eager", eager), ("llmopt", ours))}
    print(f"\n{dtype:<8}{'tokens/s':>10}{'first token':>14}{'compile':>10}")
    for name, generations, compiling in (("eager", eager, 0.0), ("llmopt", ours, compile_seconds)):
        first = sum(g.first_seconds for g in generations) / len(generations) * 1e3
        compile_text = f"{compiling:.1f} s" if compiling else "–"
        print(f"{name:<8}{rate[name]:>10.1f}{first:>11.0f} ms{compile_text:>10}")
    print(f"{rate['llmopt'] / rate['eager']:.2f}× eager's tokens/s\n")


def _tokens_per_second(generations: list[Generation]) -> float:
    tokens = sum(len(g.tokens) - 1 for g in generations)
    seconds = sum(g.rest_seconds for g in generations)
    return tokens / seconds if tokens else float("nan")
