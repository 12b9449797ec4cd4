"""The torch.compile backend: Dynamo graph → passes → plan → executable, the whole pipeline on one screen."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from llmopt import autocast, inplace_views, settings
from llmopt.auto import choose as auto
from llmopt.compiled import CompiledGraph
from llmopt.constants import fix_numbers
from llmopt.contexts import enclose
from llmopt.executor import build_executable
from llmopt.gpu.device import choose_target, gpu_among
from llmopt.gpu.tune.lookup import chooser_for
from llmopt.graph import fake, kind, tensors_in
from llmopt.guards import take_over
from llmopt.keywords import place_operands
from llmopt.lossless import Lossless, look_at
from llmopt.messages import say, warn_once
from llmopt.options import Options, check_for_cpu, check_for_gpu, parse_options
from llmopt.overlaps import Overlaps, overlaps_of
from llmopt.passes import attention_precision, mirror_caches, narrow, quantize, results
from llmopt.passes.pipeline import GUARDS, passes
from llmopt.passes.simplify import drop_idle_dropouts
from llmopt.passes.verify import check_form, check_values, run_again, run_copy
from llmopt.plan import make_plan
from llmopt.quant.budget import Decision
from llmopt.regions import inline
from llmopt.tracing import trace_layers_whole
from llmopt.tune.lookup import tuner_for
from llmopt.types import Choice, Target
from llmopt.windows import pin
from llmopt.writes import separate_windows

log = logging.getLogger("llmopt")
trace_layers_whole()  # PyTorch imports this module before it traces a model for it

_RECOMPILE_LIMITS = (8, 64)  # Dynamo's own default, and ours
_GRADIENTS = (
    "gradients are needed (call under torch.no_grad() or torch.inference_mode() for acceleration)"
)


# Tiers in which halves of floats were measured to pay: where tiles multiply, reading and writing f32 takes most of the time.
_NARROWS = ("amx",)


def llmopt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    """Compiles one Dynamo graph; what `torch.compile(model, backend="llmopt")` calls.

    mode: what torch.compile knows; "max-autotune" also measures linears that were not tuned yet, the others compile the same.
    options: see `llmopt.options`.
    Raises ValueError for a mode or option that does not exist, naming those that do.
    """
    chosen = parse_options(mode, options)
    _raise_recompile_limit()
    inline(gm)
    place_operands(gm.graph)
    drop_idle_dropouts(gm.graph)
    tensors = [t for t in example_inputs if isinstance(t, torch.Tensor)]
    machine, reason = choose_target(chosen.target, tensors)
    reason = reason or _why_not(gm, example_inputs, tensors) or enclose(gm)
    reason = reason or inplace_views.write_out(gm.graph) or pin(gm)
    overlaps = None if reason else overlaps_of(gm.graph, gm)
    if not reason and autocast.is_on():
        reason = autocast.write_casts(gm.graph) if machine.gpu is None else autocast.LEFT_TO_PYTORCH
    if reason:
        say(1, f"graph of {len(gm.graph.nodes)} nodes runs as in PyTorch: {reason}")
        if reason == _GRADIENTS:
            warn_once(f"a graph runs as in PyTorch: {reason}")
        return CompiledGraph(None, gm, {}, chosen, reason)
    if machine.gpu is None:
        check_for_cpu(chosen)
    else:
        check_for_gpu(chosen, str(machine))
    compiled = _compile(gm, example_inputs, chosen, machine, overlaps)
    return compiled if GUARDS in settings.disabled_passes() else take_over(compiled, gm)


def _raise_recompile_limit() -> None:
    """Prompts, batches and padding of a few shapes, or a few models, soon make eight graphs of one forward; then Dynamo gives up for good.

    A limit that somebody set stays as it is.
    """
    config: Any = torch._dynamo.config
    default, ours = _RECOMPILE_LIMITS
    if config.recompile_limit == default:
        config.recompile_limit = ours


def _compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    machine: Target,
    overlaps: Overlaps | None,
) -> Callable:
    clock = _Clock()
    fix_numbers(gm.graph)
    separate_windows(gm.graph)
    decision = _run_passes(gm, example_inputs, options, machine, clock)
    if machine.gpu is None:
        held = _held(gm, example_inputs, options)
        plan = make_plan(gm.graph, machine, tuner_for(machine, options.mode), lossless=held)
    else:
        chooser = chooser_for(machine, options.mode, gpu_among(example_inputs))
        plan = make_plan(gm.graph, machine, lambda _: Choice(), chooser)
    if options.kv_cache == "int8":
        lowered = {record.node: record.note for record in plan.records()}
        plan.notes = tuple(mirror_caches.notes(gm.graph, lowered))
        for note in plan.notes:
            warn_once(note)
    clock.lap("plan")
    if not plan.segments:
        say(1, "nothing in this graph has a native kernel")
    executable = build_executable(gm, plan, options)
    clock.lap("build")
    say(2, str(plan))
    for note in plan.notes:
        say(1, note)
    for fallback in plan.fallbacks:
        where = f"  [{fallback.source}]" if fallback.source else ""
        say(
            1,
            f"runs as in PyTorch: {kind(fallback.node)} ({fallback.node.name}): {fallback.reason}{where}",
        )
    if decision:
        say(1, f"precision='auto': {decision.summary()}")
        if decision.note:
            log.warning("precision='auto': %s", decision.note)
    return CompiledGraph(
        plan, executable, clock.seconds, options, decision=decision, overlaps=overlaps
    )


def _why_not(
    gm: fx.GraphModule, example_inputs: Sequence[Any], tensors: Sequence[torch.Tensor]
) -> str:
    """Why a graph is left to PyTorch as a whole, or ""."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _GRADIENTS
    if any(not isinstance(t, torch.Tensor | int | float | torch.SymInt) for t in example_inputs):
        return "an input is neither tensor nor number"
    if any(value.is_nested for node in gm.graph.nodes for value in tensors_in(fake(node))):
        return "nested tensors have sizes that are no numbers"
    return ""


def _run_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    machine: Target,
    clock: _Clock,
) -> Decision | None:
    """Returns what precision="auto" decided."""
    decision = None

    def quantise(graph: fx.Graph) -> None:
        nonlocal decision
        schemes = None
        if options.precision == "auto":
            held = _held(gm, example_inputs, options)
            budget = options.accuracy_budget
            chosen = auto.choose(gm, example_inputs, budget, options.mode, lossless=held)
            if chosen is not None:
                decision, schemes = chosen.decision, chosen.schemes
        exact = quantize.run(graph, options.scheme, schemes)
        _say_exact(options, exact)
        attention = _attention(graph, options, machine)
        attention_precision.run(graph, attention)
        if attention == "bf16" and machine.tier in _NARROWS:
            narrow.run(graph)
        if options.kv_cache == "int8":
            mirror_caches.run(graph, machine)

    chosen = passes(quantise, settings.disabled_passes())
    before = results.layouts(gm.graph)
    values = run_copy(gm, example_inputs) if settings.verify_passes() else None
    for name, run in chosen:
        run(gm.graph)
        check_form(gm.graph, name)
        clock.lap(name)
        if settings.debug_level() >= 3:
            say(3, f"graph after {name}:\n{gm.graph}")
        if values is not None:
            check_values(values, run_again(gm, example_inputs, name), name)
            clock.lap("verify")
    results.keep(gm.graph, before)
    return decision


def _held(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Lossless:
    return look_at(gm, inputs) if options.storage == "lossless" else Lossless()


def _attention(graph: fx.Graph, options: Options, machine: Target) -> str:
    """What the products of attentions may round to. precision="auto" has measured them as they are."""
    if options.attention is not None:
        return options.attention
    rounds = machine.gpu is None and options.precision != "auto"
    return "bf16" if rounds and attention_precision.rounds_activations(graph) else "exact"


def _say_exact(options: Options, layers: Sequence[str]) -> None:
    """Names the layers that cannot have the precision that was asked for."""
    if layers:
        more = f" (and {len(layers) - 1} more: LLMOPT_DEBUG=1 lists them)" if layers[1:] else ""
        other = "; the option group takes these" if "groups of" in layers[0] else ""
        warn_once(f"precision={options.precision!r} leaves exact: {layers[0]}{other}{more}")
    for layer in layers:
        say(1, f"stays exact: {layer}")


class _Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
