"""What sample inputs tell about the inputs of each linear: their magnitudes per channel and their second moments."""

from __future__ import annotations

import contextlib
import copy
import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llmopt.quant.layers import buffers_of, output_head, text_config_of

# A sample is what the model is called with: keyword inputs, positional inputs, or one tensor.
Sample = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor


@dataclass
class Inputs:
    """The inputs of one linear over all samples."""

    peak: Tensor  # [K] float32, the largest magnitude
    total: Tensor  # [K] float32, the sum of magnitudes
    moments: Tensor | None  # [K, K] float32, the sum of x xᵀ
    tokens: int = 0

    @property
    def mean(self) -> Tensor:
        """[K]: the mean magnitude."""
        return self.total / self.tokens


_SAMPLES = (
    "iterable of model inputs "
    "(a tensor, a tuple of positional inputs or a dict of keyword inputs each)"
)


def samples_of(calibration: Iterable[Sample] | Sample | None) -> list[Sample]:
    """The samples as a list; one tensor or mapping alone is one sample. Raises ValueError when there are none."""
    if isinstance(calibration, Tensor | Mapping | tuple):
        calibration = [calibration]
    samples = list(_each(() if calibration is None else calibration))
    for i, sample in enumerate(samples):
        if not isinstance(sample, Tensor | Mapping | tuple | list):
            kind = type(sample).__name__
            raise ValueError(
                f"llmopt: calibration sample {i} is of type {kind}: give an {_SAMPLES}"
            )
    if not samples:
        raise ValueError(f"llmopt: calibration holds no samples: give an {_SAMPLES}")
    hollow = [i for i, s in enumerate(samples) if not isinstance(s, Tensor) and not s]
    if hollow:
        raise ValueError(f"llmopt: calibration sample {hollow[0]} holds no inputs")
    empty = [i for i, sample in enumerate(samples) if any(t.numel() == 0 for t in _tensors(sample))]
    if empty:
        raise ValueError(f"llmopt: calibration sample {empty[0]} holds an empty tensor")
    return samples


def _each(calibration: Any) -> Iterator[Sample]:
    cls = type(calibration)
    if not hasattr(cls, "__iter__") and hasattr(cls, "__getitem__") and hasattr(cls, "__len__"):
        return map(calibration.__getitem__, range(len(calibration)))  # of a map-style Dataset
    try:
        return iter(calibration)
    except TypeError as error:
        raise ValueError(f"llmopt: calibration={calibration!r} is no {_SAMPLES}") from error


def forms_of(samples: list[Sample]) -> list[Sample]:
    """The first sample of each form: where models branch on what they are called with, one for each way.

    Samples are of one form when they have the same names and types, flags and None in the same places, numbers that are all 0 or all not,
    and tensors of the same dtype and number of dimensions, of which the same ones have size 1.
    """
    return list({_form(sample): sample for sample in reversed(samples)}.values())[::-1]


def _form(sample: Sample) -> tuple[Any, ...]:
    inputs = dict(sample) if isinstance(sample, Mapping) else sample
    leaves, structure = pytree.tree_flatten(inputs)
    return str(structure), *map(_form_of_input, leaves)


def _form_of_input(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return value.dtype, *(size == 1 for size in value.shape)
    if isinstance(value, str | enum.Enum):
        return type(value), value
    return type(value), not isinstance(value, int | float) or value != 0


_MOST_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions")


def random_tokens(model: nn.Module, count: int = 4, length: int = 256) -> list[Sample]:
    """Samples for a language model where no text is at hand: random tokens (seeded), the first one as a text would begin.

    Raises ValueError for a model whose config does not say the size of its vocabulary.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"llmopt: calibration='random' makes tokens, and {type(model).__name__} wants "
            f"{model.main_input_name}: give sample inputs"
        )
    config: Any = getattr(model, "config", None)
    if output_head(model) is not None:
        config = text_config_of(model)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ValueError(
            f"llmopt: calibration='random' is for language models, and {type(model).__name__} "
            "names no vocabulary: give sample inputs"
        )
    limits = (getattr(config, name, None) for name in _MOST_POSITIONS)
    longest = min((n for n in limits if isinstance(n, int) and n > 2), default=length + 2)
    longest -= 2  # RoBERTa and its kin count positions from 2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (count, min(length, longest)), generator=generator)
    first = getattr(config, "bos_token_id", None)
    if isinstance(first, int) and 0 <= first < vocabulary:
        ids[:, 0] = first
    device = next(model.parameters()).device
    names = ["input_ids"]
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    return [{name: row[None].to(device) for name in names} for row in ids]


def call(model: nn.Module, sample: Sample) -> Any:
    """The model's output for a copy of one sample, without gradients: a cache in it is the same for every call."""
    inputs = _copied(sample)
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _copied(sample: Sample) -> Sample:
    """What cannot be copied is handed over itself."""
    try:
        return copy.deepcopy(sample)
    except (RuntimeError, TypeError):  # tensors with a history, locks
        return sample


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the while: dropout off. Then every module has the attributes it had, and its buffers their values.

    What a forward writes into other attributes, such as lists, stays.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    attributes = [
        (own, dict(own))
        for m in modules
        for own in (vars(m), vars(m).get("_buffers"))
        if isinstance(own, dict)
    ]
    values = [(buffer, buffer.detach(), buffer.clone()) for buffer in buffers_of(model)]
    model.eval()
    try:
        yield
    finally:
        for own, before in attributes:
            own.clear()
            own.update(before)
        for module in training:  # those of TorchScript keep it elsewhere
            module.training = True
        _write_back(values)


@torch.no_grad()
def _write_back(values: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for tensor, memory, value in values:
        tensor.data = memory
        if not ((tensor == value) | (tensor.isnan() & value.isnan())).all():
            tensor.copy_(value)


def observe(
    model: nn.Module, samples: list[Sample], linears: Mapping[str, nn.Module], moments: bool
) -> dict[str, Inputs]:
    """Runs the samples and collects the inputs of these linears; a linear that no sample reaches is not in the result.

    Raises ValueError naming the linear whose inputs, or their second moments, are NaN or infinite.
    """
    seen: dict[str, Inputs] = {}

    def hook(name: str) -> Any:
        def collect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = next(iter((*args, *kwargs.values())))
            _add(seen, name, x.detach().reshape(-1, x.shape[-1]).float(), moments)

        return collect

    handles = [
        linear.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, linear in linears.items()
    ]
    try:
        with evaluating(model):
            for sample in samples:
                call(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    for name, inputs in seen.items():
        if not inputs.peak.isfinite().all():
            raise ValueError(f"llmopt: calibration makes NaN or infinite inputs of {name}")
        if inputs.moments is not None and not inputs.moments.isfinite().all():
            raise ValueError(
                f"llmopt: calibration makes inputs of {name} up to {float(inputs.peak.max()):.3g}, "
                "whose squares float32 does not hold"
            )
    return seen


def _add(seen: dict[str, Inputs], name: str, x: Tensor, moments: bool) -> None:
    if not x.shape[0]:  # an expert that no token chose
        return
    if name not in seen:
        k = x.shape[1]
        zeros = x.new_zeros
        seen[name] = Inputs(zeros(k), zeros(k), zeros(k, k) if moments else None)
    inputs = seen[name]
    magnitude = x.abs()
    inputs.peak = torch.maximum(inputs.peak, magnitude.amax(0))
    inputs.total += magnitude.sum(0)
    if inputs.moments is not None:
        inputs.moments.addmm_(x.T, x)
    inputs.tokens += x.shape[0]


def _tensors(sample: Sample) -> list[Tensor]:
    if isinstance(sample, Tensor):
        return [sample]
    values = sample.values() if isinstance(sample, Mapping) else sample
    return [v for v in values if isinstance(v, Tensor)]
