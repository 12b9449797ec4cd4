"""Programs nobody wrote: random steps of what models are made of, each on earlier values, as the source of a function.

A step is drawn, tried in eager, and kept when it works. Views, writes in place and several results are frequent, because they are what
passes go wrong on. The source is what a failing test shows, and what `minimal` shortens.
"""

from __future__ import annotations

import linecache
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, WIDTH = 3, 8
INNER = HEADS * WIDTH
MOST = 20_000  # elements of a value
ARGUMENTS = ("x", "y", "h", "v", "ids", "m")

UNARY = """torch.tanh({a}) | F.gelu({a}) | F.silu({a}) | -{a} | {a} * 0.5 | 1 - {a} | torch.sigmoid({a}) | {a}.square() * 0.1 |
{a}.clone() | {a}.contiguous() | {a}.clamp(-1, 1) | {a}.softmax(-1) | F.dropout({a}, 0.1, False) | 2 / ({a}.abs() + 1) | {a}.detach() |
{a}.to({a}.dtype) | torch.rsqrt({a}.pow(2) + 1) | {a}.masked_fill({a} > 0.5, 0.5) | torch.where({a} > 0, {a}, 0.0) | {a}.flip(-1) |
F.elu({a}) | F.softplus({a}) | F.mish({a}) | F.hardswish({a}) | {a}.pow(3) * 0.1 | F.leaky_relu({a}) | torch.expm1({a}.clamp(max=1))"""
BINARY = """{a} + {b} | {a} * {b} | {a} - {b} | torch.maximum({a}, {b}) | F.silu({a}) * {b} | {a} / ({b}.abs() + 1) |
torch.add({a}, {b}, alpha=0.5) | {a}.mul({b}).add({a}) | torch.where({a} < {b}, {a}, {b}) |
(({a} > 0) & ({b} > 0)) * {a} * {b} | torch.max({a}, {b} * 0.5) | {a}.clamp(max={b}) | torch.addcmul({a}, {a}, {b}, value=0.1)"""
VIEWS = """{a}.transpose(0, -1) | {a}.transpose(1, 2) | {a}.permute(1, 0, 2) | {a}.permute(0, 2, 3, 1) | {a}[..., 1:4] | {a}[:, ::2] |
{a}.narrow(-1, 1, 2) | {a}.select(1, 0) | {a}[:, -1] | {a}.chunk(2, -1)[1] | {a}.split(12, -1)[0] | {a}.unflatten(-1, (2, -1)) |
{a}.unsqueeze(1) | {a}.flatten(1) | {a}.reshape(-1) | {a}.reshape({a}.shape[0], -1) | {a}.view(-1, {a}.shape[-1]) | {a}.unbind(0)[0] |
{a}.expand(2, *{a}.shape) | {a}[None]"""
TO_HEADS = "{a}.reshape({a}.shape[0], {a}.shape[1], 3, 8).transpose(1, 2) | {a}.view({a}.shape[0], -1, 3, 8).transpose(1, 2)"
FROM_HEADS = (
    "{a}.transpose(1, 2).reshape({a}.shape[0], {a}.shape[2], 24) | {a}.transpose(1, 2).flatten(2)"
)
LINEAR = """F.linear({a}, W) | F.linear({a}, W, b) | {a} @ W.t() | F.gelu(F.linear({a}, W, b)) | F.linear({a}, W) + {a} |
F.linear({a}, W2).chunk(2, -1)[0] | F.linear(F.silu(F.linear({a}, W2)[..., :24]) * F.linear({a}, W2)[..., 24:], W)"""
NORMS = """{a} * torch.rsqrt({a}.pow(2).mean(-1, keepdim=True) + 1e-5) | F.layer_norm({a}, (24,)) | F.rms_norm({a}, (24,), g, 1e-5) |
(g * ({a}.float() * torch.rsqrt({a}.float().pow(2).mean(-1, keepdim=True) + 1e-6))).to({a}.dtype)"""
ROWS = """{a}.sum(-1, keepdim=True) | {a}.mean(-1, keepdim=True) | {a}.amax(-1) | {a}.cumsum(1) | {a}.max(-1)[0] | {a}.mean() |
F.log_softmax({a}, -1) | {a} / (1 + {a}.norm(dim=-1, keepdim=True)) | {a} - {a}.amax(-1, keepdim=True) |
{a} * torch.logsumexp({a}, -1, keepdim=True) | {a} / (1 + {a}.var(-1, unbiased=False, keepdim=True)) | F.normalize({a} + 3, dim=-1)"""
JOINS = """torch.cat(({a}, {a}), 1) | torch.stack(({a}, {a}), 1) | {a}.repeat_interleave(2, 1) | torch.roll({a}, 1, 1) |
{a}.repeat(2, *(1,) * {a}.dim()) | torch.tile({a}, (2,)) | torch.stack([{a}, {b}], -1) | {a}.repeat_interleave(1, 1) |
torch.cat((-{a}[..., {a}.shape[-1] // 2:], {a}[..., :{a}.shape[-1] // 2]), -1)"""
ATTENTION = """F.scaled_dot_product_attention({a}, {b}, {b}) | F.scaled_dot_product_attention({a}, {b}, {b}, is_causal=True) |
({a} @ {b}.mT * 0.3).softmax(-1) @ {b} | F.scaled_dot_product_attention({a}, {b}, {a}, scale=0.5).transpose(1, 2)"""
PRODUCTS = """{a} @ {a}.mT * 0.1 | {a}.mT @ {a} * 0.1 | {a} @ {b} * 0.1 | {a} @ {b}.mT * 0.1 | torch.bmm({a}, {b}.mT) * 0.1 |
F.linear({a}, {b}[0]) * 0.1 | torch.einsum("bik,bjk->bij", {a}, {b}) * 0.1 | torch.einsum("bsd,ed->ebs", {a}, W) |
torch.addmm({b}[0, 0], {a}[0], {b}[0]) * 0.1 | ({a} @ {b}.mT).softmax(-1) @ {b} | ({a}.mT @ {b}).view(-1)"""
PICKS = """F.embedding(ids, T) | T[ids] | x.masked_fill(~m[..., None], 0.0) | torch.where(m[..., None], x, y) | x[:, [0]] |
x.gather(-1, ids[..., None]) | torch.arange(x.shape[1])[:, None].to(x.dtype)"""
WRITES = """{a}.mul_(0.5) | {a}.relu_() | {a}.zero_() | {a} += 1 | {a}.fill_(0.3) | F.relu({a}, inplace=True) | {a} += {b} | {a} *= {b} |
{a}.add_({b}) | {a}.copy_({b}) | {a}.masked_fill_({a} > 0.4, 0.4) | {a}[:, 1:] *= 0.5 | {a}[..., :2] = 0.25 | {a}[:, :1] = {b}[:, -1:] |
{a}[..., 1:3].copy_(F.silu({b})[..., 1:3]) | {a}.index_copy_(1, torch.tensor([0]), {a}.narrow(1, 1, 1) * 0.5)"""
CASTS = "{a}.float() | {a}.to(torch.bfloat16) | {a}.half() | {a}.type_as(x)"


def _ends_in(*shape: int) -> Callable[[Tensor], bool]:
    return lambda t: tuple(t.shape[-len(shape) :]) == shape


def _are_heads(t: Tensor) -> bool:
    return t.dim() == 4 and t.shape[1] == HEADS and t.shape[3] == WIDTH


# how often; which values a step may take; the steps
STEPS: tuple[tuple[int, Callable[[Tensor], bool], str], ...] = (
    (8, lambda t: True, UNARY), (10, lambda t: True, BINARY), (14, lambda t: True, VIEWS), (6, _ends_in(INNER), TO_HEADS),
    (6, _are_heads, FROM_HEADS), (8, _ends_in(INNER), LINEAR), (5, _ends_in(INNER), NORMS), (4, lambda t: True, ROWS),
    (4, lambda t: True, JOINS), (6, lambda t: t.dim() > 1, PRODUCTS),
    (6, _are_heads, ATTENTION), (4, lambda t: True, PICKS), (14, lambda t: True, WRITES),
    (2, lambda t: True, CASTS),
)  # fmt: skip


class Program:
    """One program: its source, the parameters and the arguments that it reads."""

    def __init__(self, seed: int, steps: int = 14) -> None:
        self.random, self._torch = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16])
        batch, length = self.random.choice([1, 2, 3]), self.random.choice([1, 2, 5, 7, 16])
        self.parameters = {
            "W": self._parameter(INNER, INNER), "b": self._parameter(INNER), "g": self._parameter(INNER),
            "W2": self._parameter(2 * INNER, INNER), "T": self._parameter(11, INNER),
        }  # fmt: skip
        self.arguments = self._draw(batch, length)
        self.larger = self._draw(batch + 1, length + 4)
        self.lines, self.returned = self._written(steps)

    @property
    def source(self) -> str:
        body = "".join(f"    {line}\n" for line in self.lines)
        head, end = ", ".join(ARGUMENTS), ", ".join(self.returned)
        return f"def program({head}):\n{body}    return ({end},)\n"

    @property
    def is_short(self) -> bool:
        """Whether it rounds to 16 bits somewhere."""
        casts = any(name in self.source for name in ("bfloat16", "half"))
        return casts or self.dtype != torch.float32

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        name = f"<program {abs(hash(self.source))}>"
        source = self.source
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        space: dict[str, Any] = {"torch": torch, "F": F, **self.parameters}
        exec(compile(source, name, "exec"), space)
        return space["program"]

    def _parameter(self, *shape: int) -> nn.Parameter:
        values = torch.randn(*shape, generator=self._torch) / shape[-1] ** 0.5
        return nn.Parameter(values.to(self.dtype), requires_grad=False)

    def _draw(self, batch: int, length: int) -> dict[str, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self._torch).to(self.dtype)

        values = {"x": randn(batch, length, INNER), "y": randn(batch, length, INNER)}
        values |= {"h": randn(batch, HEADS, length, WIDTH), "v": randn(INNER)}
        values["ids"] = torch.randint(0, 11, (batch, length), generator=self._torch)
        values["m"] = torch.rand(batch, length, generator=self._torch) > 0.3
        return values

    def _written(self, steps: int) -> tuple[list[str], list[str]]:
        values = {name: t.clone() for name, t in self.arguments.items()}
        space = {"torch": torch, "F": F, **self.parameters}
        lines: list[str] = []
        for attempt in range(20 * steps):
            line = self._step(values, f"t{attempt}")
            if line is None or len(lines) == steps:
                continue
            try:
                exec(line, space, values)
            except (RuntimeError, IndexError, ValueError):  # a step that these shapes cannot take
                continue
            made = values.get(f"t{attempt}")
            if made is not None and not 0 < made.numel() <= MOST:
                del values[f"t{attempt}"]
                continue
            lines.append(line)
        made_names = list(values)[len(ARGUMENTS) :] or ["x"]
        count = min(self.random.randint(0, 3), len(made_names))
        return lines, list(dict.fromkeys([made_names[-1], *self.random.sample(made_names, count)]))

    def _step(self, values: dict[str, Tensor], name: str) -> str | None:
        weights, rules, texts = zip(*STEPS, strict=True)
        i = self.random.choices(range(len(STEPS)), weights)[0]
        a = self._pick(values, rules[i])
        b = self._pick(values, lambda t: a is not None and t.dtype == values[a].dtype)
        if a is None or b is None:
            return None
        text = self.random.choice(texts[i].split("|")).strip().format(a=a, b=b)
        if texts[i] is not WRITES:
            return f"{name} = {text}"
        return None if 0 in values[a].stride() else text

    def _pick(self, values: dict[str, Tensor], fits: Callable[[Tensor], bool]) -> str | None:
        """A float value, a late one more often."""
        names = [n for n, t in values.items() if t.is_floating_point() and fits(t)]
        return self.random.choices(names, range(1, len(names) + 1))[0] if names else None


def minimal(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The same program with as few results and lines as still fail."""
    for part in ("returned", "lines"):
        i = len(getattr(program, part)) - 1
        while i >= 0:
            whole = getattr(program, part)
            setattr(program, part, whole[:i] + whole[i + 1 :])
            if not getattr(program, part) or not fails(program):
                setattr(program, part, whole)
            i -= 1
    return program
