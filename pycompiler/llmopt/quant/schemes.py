"""Quantisation schemes: how a linear's weights are stored and how its inputs are read.

A name such as "w8a8" says the bits of weights and of activations; 16 stands for activations as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

CHANNEL = 0  # the group that spans a whole output channel
GROUPS = (CHANNEL, 32, 64, 128)


@dataclass(frozen=True)
class CodeForm:
    """How a weight is stored as codes."""

    bits: int  # 8 or 4
    group: int  # inputs that share a scale; CHANNEL: all of them
    symmetric: bool  # weights are scale · code, without an offset

    def group_of(self, k: int) -> int:
        """The inputs that share a scale in a linear of k inputs."""
        return k if self.group == CHANNEL else self.group

    def reject(self, k: int) -> str:
        """Why a linear of k inputs cannot have this form; "" when it can."""
        if k == 0:
            return "it has no inputs"
        if self.bits == 4 and k % 2:
            return f"{k} inputs are odd, and two 4-bit codes share a byte"
        if k % self.group_of(k):
            fitting = [str(g) for g in GROUPS if g and k % g == 0]
            return (
                f"groups of {self.group} do not divide its {k} inputs; "
                f"possible: {', '.join(['channel', *fitting])}"
            )
        return ""


@dataclass(frozen=True)
class Scheme(CodeForm):
    """One way to quantise one linear: the form of its weight, whose groups its inputs share, and how inputs are read."""

    activations: str  # "same": as they are; "int8": rounded per token and group

    @property
    def name(self) -> str:
        return f"w{self.bits}a{8 if self.activations == 'int8' else 16}"

    def __str__(self) -> str:
        group = "per channel" if self.group == CHANNEL else f"groups of {self.group}"
        return f"{self.name}, {group}, {'symmetric' if self.symmetric else 'asymmetric'}"


W8A8 = Scheme(8, 64, symmetric=True, activations="int8")
W8A16 = Scheme(8, 32, symmetric=True, activations="same")
W4A16 = Scheme(4, 32, symmetric=False, activations="same")
W4A8 = Scheme(4, 32, symmetric=False, activations="int8")
SCHEMES: Mapping[str, Scheme] = {s.name: s for s in (W8A8, W8A16, W4A16, W4A8)}


def scheme_of(
    scheme: str | Scheme, group: int | str | None = None, symmetric: bool | None = None
) -> Scheme:
    """The scheme of a name ("w8a8", "w8a16", "w4a16", "w4a8") with its defaults, or with these.

    group: "channel", 32, 64 or 128. Raises ValueError that names what is possible.
    """
    if not isinstance(scheme, Scheme):
        if not isinstance(scheme, str) or scheme not in SCHEMES:
            raise ValueError(
                f"llmopt: scheme {scheme!r} does not exist; possible: {', '.join(SCHEMES)}"
            )
        scheme = SCHEMES[scheme]
    if group is not None:
        number = CHANNEL if group == "channel" else group
        if number not in GROUPS or isinstance(number, bool) or group == CHANNEL:
            raise ValueError(
                f"llmopt: group={group!r} does not exist; possible: 'channel', 32, 64, 128"
            )
        scheme = dataclasses.replace(scheme, group=int(number))
    if symmetric is not None:
        scheme = dataclasses.replace(scheme, symmetric=bool(symmetric))
    return scheme


def of_head(scheme: Scheme, symmetric: bool | None = None) -> Scheme:
    """The scheme of a language model's output head under this one: 8 bits in the same groups, activations as they are.

    Every rounding error of the head is one of the logits. symmetric: what the user asked for, None: nothing.
    """
    if symmetric is None:
        symmetric = scheme.symmetric or scheme.bits == 4
    return Scheme(8, scheme.group, symmetric, activations="same")
