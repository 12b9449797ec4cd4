"""Options and modes of the backend. Anything unknown is an error that names what is possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmopt.quant.budget import DEFAULT_BUDGET, check_budget
from llmopt.quant.schemes import SCHEMES, Scheme, scheme_of

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PRECISIONS = ("exact", *SCHEMES, "auto")
WEIGHTS = ("keep", "packed")
KV_CACHES = ("same", "int8")
STORAGES = ("lossless", "same")
ATTENTIONS = ("exact", "bf16", "int8")
DEVICES = ("cpu", "cuda", "hip")
CPU_ONLY = (("precision", "auto"), ("weights", "packed"), ("attention", "bf16"))
GPU_ONLY = (("attention", "int8"),)


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    mode: str = "default"
    precision: str = "exact"
    group: int | str | None = None  # of the precision's scales; None: as its scheme has them
    accuracy_budget: float = DEFAULT_BUDGET  # of precision="auto": how far the result may move
    kv_cache: str = "same"
    attention: str | None = (
        None  # what products may round to; None: bf16 where linears round activations to 8 bits, else exact
    )
    target: str | None = None  # None: the machine or GPU the tensors are on
    storage: str = "lossless"  # of float32 weights: in fewer bits where those hold them as they are
    weights: str = "keep"  # "packed": the module's own leave memory once packed, see llmopt.offload

    @property
    def scheme(self) -> Scheme | None:
        """Of the linears that are not quantised yet; None where one is chosen for each of them, or none is."""
        return scheme_of(self.precision, self.group) if self.precision in SCHEMES else None


def _choose(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"llmopt: {name}={value!r} does not exist; possible: {', '.join(known)}")
    return value


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Checks mode and options; raises ValueError that names the allowed values.

    The mode may stand among the options, since torch.compile takes a mode or options, not both.
    """
    if not isinstance(options, Mapping | None):
        raise ValueError(
            f"llmopt: options={options!r} is no dictionary; possible: options={{'precision': 'w8a8'}}"
        )
    given = dict(options or {})
    names = ("mode", "precision", "group", "accuracy_budget", "kv_cache", "attention", "storage", "target", "weights")  # fmt: skip
    for name in given:
        if name not in names:
            raise ValueError(
                f"llmopt: option {name!r} does not exist; possible: {', '.join(names)}"
            )
    if mode is not None and "mode" in given:
        raise ValueError(f"llmopt: mode={mode!r} and options={{'mode': {given['mode']!r}}}: one of them is possible")  # fmt: skip
    wanted_target = given.get("target")
    device = wanted_target.split(":")[0] if isinstance(wanted_target, str) else wanted_target
    if wanted_target is not None and device not in DEVICES:
        raise ValueError(
            f"llmopt: target={wanted_target!r} does not exist; possible: cpu, cuda:<generation>, hip:<generation>"
        )
    if "accuracy_budget" in given and given.get("precision") != "auto":
        raise ValueError("llmopt: accuracy_budget is for precision='auto'")
    precision = _choose("precision", given.get("precision", "exact"), PRECISIONS)
    if precision in SCHEMES:
        scheme_of(precision, given.get("group"))  # raises where there is no such group
    elif "group" in given:
        raise ValueError(f"llmopt: group is for precision={', '.join(SCHEMES)}, not {precision!r}")
    chosen = Options(
        accuracy_budget=check_budget(given.get("accuracy_budget", DEFAULT_BUDGET)),
        mode=_choose("mode", mode or given.get("mode", "default"), MODES),
        precision=precision,
        group=given.get("group"),
        kv_cache=_choose("kv_cache", given.get("kv_cache", "same"), KV_CACHES),
        attention=_choose("attention", given["attention"], ATTENTIONS)
        if "attention" in given
        else None,
        storage=_choose("storage", given.get("storage", "lossless"), STORAGES),
        target=wanted_target,
        weights=_choose("weights", given.get("weights", "keep"), WEIGHTS),
    )
    if wanted_target not in (None, "cpu"):
        check_for_gpu(chosen, str(wanted_target))
    return chosen


def check_for_gpu(options: Options, target: str) -> None:
    """Raises ValueError when options that only the CPU has were asked for with a GPU target."""
    for name, value in CPU_ONLY:
        if getattr(options, name) == value:
            raise ValueError(
                f"llmopt: {name}={value!r} is not available for target={target!r}; possible: for cpu"
            )


def check_for_cpu(options: Options) -> None:
    """Raises ValueError when options that only GPUs have were asked for where the target is the CPU."""
    for name, value in GPU_ONLY:
        if getattr(options, name) == value:
            raise ValueError(
                f"llmopt: {name}={value!r} is not available for target='cpu'; possible: for cuda:<generation>, hip:<generation>"
            )
