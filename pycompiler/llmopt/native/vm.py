"""Builds programs for the elementwise VM: values in, one list of ints and one of floats out.

A program reads inputs, computes in fp32 and writes outputs, all presented with one iteration shape
(broadcast inputs have stride 0). Row reductions run over the last dimension and give every element
of the row the same value; an output whose last stride is 0 receives one value a row. All inputs are
read as they were before the program; an output may be the very same view as an input and must not
overlap inputs otherwise. Numbers are the contract with csrc/cpu/vm/bytecode.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

LOAD, STORE = 0, 1
SUPPORTED_UNARY = {
    "copy": 8,
    "neg": 9,
    "abs": 10,
    "sqrt": 11,
    "rsqrt": 12,
    "reciprocal": 13,
    "exp": 14,
    "exp2": 15,
    "log": 16,
    "log1p": 17,
    "tanh": 18,
    "sigmoid": 19,
    "erf": 20,
    "silu": 21,
    "gelu_erf": 22,
    "gelu_tanh": 23,
    "quick_gelu": 24,  # x * sigmoid(1.702 x)
    "relu": 25,
    "relu2": 26,  # relu(x)^2
    "square": 27,
    "sin": 28,
    "cos": 29,
    "round": 30,  # half to even
    "floor": 31,
    "logical_not": 32,
    "round_f16": 33,  # to the dtype and back: what a store in it would keep
    "round_bf16": 34,
}
SUPPORTED_BINARY = {
    "add": 64,
    "sub": 65,
    "mul": 66,
    "div": 67,
    "maximum": 68,  # NaN where either is NaN, like torch
    "minimum": 69,
    "lt": 70,
    "le": 71,
    "gt": 72,
    "ge": 73,
    "eq": 74,
    "ne": 75,
    "logical_and": 76,
    "logical_or": 77,
}
TERNARY = {"where": 96, "mul_add": 97}
REDUCTIONS = {"sum": 112, "mean": 113, "max": 114, "min": 115}

MAX_TENSORS = 24  # kMaxSpaceTensors in csrc/cpu/iteration_space.h
MAX_REGISTERS = 255  # registers and constants share one byte of an instruction


class Unsupported(Exception):
    """The VM cannot express this; the message says what and why."""


@dataclass(frozen=True)
class Node:
    """One value: `op` with the numbers of its argument values, an input's number, or a constant."""

    op: str
    args: tuple[int, ...] = ()
    input: int = -1
    value: float = 0.0

    @property
    def code(self) -> int:
        tables = (SUPPORTED_UNARY, SUPPORTED_BINARY, TERNARY)
        if self.op.startswith("row_"):
            return REDUCTIONS[self.op.removeprefix("row_")]
        return next(table[self.op] for table in tables if self.op in table)


@dataclass
class VmProgram:
    """A program under construction; methods return value numbers, the arguments of later calls."""

    num_inputs: int
    num_outputs: int
    nodes: list[Node] = field(default_factory=list)
    stores: dict[int, int] = field(default_factory=dict)  # output → value
    _known: dict[tuple, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_inputs + self.num_outputs > MAX_TENSORS:
            raise Unsupported(
                f"{self.num_inputs} inputs and {self.num_outputs} outputs: "
                f"at most {MAX_TENSORS} together"
            )

    # Values -------------------------------------------------------------------------------

    def load(self, i: int) -> int:
        """Input i as fp32; bool gives 0 and 1, integers beyond 2^24 are rounded."""
        if not 0 <= i < self.num_inputs:
            raise ValueError(f"input {i} of {self.num_inputs}")
        return self._add(Node("load", input=i))

    def const(self, x: float) -> int:
        return self._add(Node("const", value=float(x)))

    def unary(self, name: str, a: int) -> int:
        return self._apply(SUPPORTED_UNARY, name, (a,))

    def binary(self, name: str, a: int, b: int) -> int:
        return self._apply(SUPPORTED_BINARY, name, (a, b))

    def where(self, condition: int, a: int, b: int) -> int:
        """a where the condition is not zero (NaN counts as true), b elsewhere."""
        return self._apply(TERNARY, "where", (condition, a, b))

    def mul_add(self, a: int, b: int, c: int) -> int:
        """a * b + c, rounded once where the CPU can."""
        return self._apply(TERNARY, "mul_add", (a, b, c))

    def clamp(self, a: int, low: float | None = None, high: float | None = None) -> int:
        if low is not None:
            a = self.binary("maximum", a, self.const(low))
        return a if high is None else self.binary("minimum", a, self.const(high))

    def pow(self, a: int, exponent: float) -> int:
        """a to a constant power: small integers by multiplication, and the halves."""
        special: dict[float, Callable[[], int]] = {
            0.0: lambda: self.const(1.0),
            1.0: lambda: a,
            2.0: lambda: self.unary("square", a),
            0.5: lambda: self.unary("sqrt", a),
            -0.5: lambda: self.unary("rsqrt", a),
            -1.0: lambda: self.unary("reciprocal", a),
        }
        if exponent in special:
            return special[exponent]()
        if exponent != int(exponent) or abs(exponent) > 16:
            raise Unsupported(f"power {exponent}: only whole exponents up to 16 and +-0.5")
        if exponent < 0:
            return self.unary("reciprocal", self.pow(a, -exponent))
        half = self.unary("square", self.pow(a, exponent // 2))
        return self.binary("mul", half, a) if exponent % 2 else half

    def reduce(self, name: str, a: int) -> int:
        """Sum, mean, max or min of the row, as a value of the whole row."""
        if name not in REDUCTIONS:
            raise Unsupported(f"row reduction {name!r}: there are {', '.join(REDUCTIONS)}")
        return self._add(Node(f"row_{name}", (self._value(a),)))

    def store(self, i: int, a: int) -> None:
        """Writes value a to output i, rounded to its dtype (bool: not zero)."""
        if not 0 <= i < self.num_outputs:
            raise ValueError(f"output {i} of {self.num_outputs}")
        if i in self.stores:
            raise ValueError(f"output {i} is stored twice")
        self.stores[i] = self._value(a)

    # Encoding -----------------------------------------------------------------------------

    def encode(self) -> tuple[list[int], list[float]]:
        """Attributes of the `vm` step: header and instruction words, and the constants."""
        missing = [i for i in range(self.num_outputs) if i not in self.stores]
        if missing:
            raise ValueError(f"outputs {missing} are never stored")
        words, constants, registers = _assign(self._schedule())
        has_reduction = any(self.nodes[v].op.startswith("row_") for v in self._order())
        header = [self.num_inputs, self.num_outputs, registers, int(has_reduction)]
        return [*header, *words], constants

    def _value(self, a: int) -> int:
        if not 0 <= a < len(self.nodes):
            raise ValueError(f"value {a} does not exist")
        return a

    def _add(self, node: Node) -> int:
        # By its text, because NaN is not equal to itself and -0.0 is equal to 0.0.
        key = (node.op, node.args, node.input, repr(node.value))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self.nodes)
            self.nodes.append(node)
        return found

    def _apply(self, table: dict[str, int], name: str, args: tuple[int, ...]) -> int:
        if name not in table:
            raise Unsupported(f"operation {name!r}: there are {', '.join(table)}")
        return self._add(Node(name, tuple(self._value(a) for a in args)))

    def _order(self) -> list[int]:
        """Values that reach a store, arguments right before the value that needs them."""
        order: list[int] = []
        seen: set[int] = set()
        for root in self.stores.values():
            stack = [(root, False)]
            while stack:
                v, ready = stack.pop()
                if ready:
                    order.append(v)
                elif v not in seen:
                    seen.add(v)
                    stack.append((v, True))
                    stack.extend((a, False) for a in reversed(self.nodes[v].args) if a not in seen)
        return order

    def _schedule(self) -> list[_Instruction]:
        """Instructions on value numbers. Stores wait for the last load: inputs are read first."""
        order = self._order()
        fused = self._fused_products(order)
        products = set(fused.values())
        program: list[_Instruction] = []
        loads_left = sum(self.nodes[v].op == "load" for v in order)
        waiting = {v: [i for i, stored in self.stores.items() if stored == v] for v in order}
        held: list[int] = []
        for v in order:
            node = self.nodes[v]
            if v in products:
                continue
            if node.op == "load":
                loads_left -= 1
                program.append(_Instruction(LOAD, v, (), node.input, node))
            elif node.op == "const":
                program.append(_Instruction(_CONSTANT, v, (), 0, node))
            elif v in fused:
                product = self.nodes[fused[v]]
                addend = node.args[1] if node.args[0] == fused[v] else node.args[0]
                program.append(
                    _Instruction(TERNARY["mul_add"], v, (*product.args, addend), 0, node)
                )
            else:
                program.append(_Instruction(node.code, v, node.args, 0, node))
            held.append(v)
            if loads_left == 0:
                program.extend(_Instruction(STORE, -1, (u,), i) for u in held for i in waiting[u])
                held = []
        return program

    def _fused_products(self, order: list[int]) -> dict[int, int]:
        """Sum → its product, for sums with a factor product that nothing else reads."""
        uses = dict.fromkeys(order, 0)
        for read in [*(a for v in order for a in self.nodes[v].args), *self.stores.values()]:
            uses[read] += 1
        fused: dict[int, int] = {}
        for v in order:
            if self.nodes[v].op != "add":
                continue
            for a in self.nodes[v].args:
                if self.nodes[a].op == "mul" and uses[a] == 1:
                    fused[v] = a
                    break
        return fused


_CONSTANT = -1


@dataclass
class _Instruction:
    """One instruction on value numbers; `number` is the input or output it names."""

    code: int  # _CONSTANT declares a constant
    value: int
    args: tuple[int, ...]
    number: int = 0
    node: Node | None = None


def _assign(program: list[_Instruction]) -> tuple[list[int], list[float], int]:
    """Registers by liveness → (instruction words, constants, number of registers)."""
    constants = [i.node.value for i in program if i.code == _CONSTANT and i.node]
    constant_of = {i.value: k for k, i in enumerate(i for i in program if i.code == _CONSTANT)}
    program = [i for i in program if i.code != _CONSTANT]
    last_use: dict[int, int] = {}
    output_of: dict[int, int] = {}
    for position, instruction in enumerate(program):
        last_use.update(dict.fromkeys(instruction.args, position))
        if instruction.code == STORE:
            output_of.setdefault(instruction.args[0], instruction.number)

    register: dict[int, int] = {}
    free: list[int] = []
    count = 0
    placed: list[tuple[_Instruction, int, tuple[int, ...]]] = []
    for position, instruction in enumerate(program):
        # Constants are numbered behind the registers once those are counted; negative until then.
        args = tuple(
            register[a] if a in register else -1 - constant_of[a] for a in instruction.args
        )
        done = (a for a in dict.fromkeys(instruction.args) if last_use[a] == position)
        free.extend(register[a] for a in done if a in register)
        dst = 0
        if instruction.code != STORE:
            if not free:
                free.append(count)
                count += 1
            dst = register[instruction.value] = free.pop()
        placed.append((instruction, dst, args))
    if count + len(constants) > MAX_REGISTERS or len(program) > 0xFFFF:
        raise Unsupported(
            f"{count} registers, {len(constants)} constants, {len(program)} instructions: "
            f"at most {MAX_REGISTERS} registers and constants and {0xFFFF} instructions"
        )

    words = []
    for instruction, dst, args in placed:
        first = args[0] if args else 0
        padded = (*args, first, first, first)[:3]
        a, b, c = (count - 1 - r if r < 0 else r for r in padded)
        extra = 1 + output_of[instruction.value] if instruction.value in output_of else 0
        if instruction.code == LOAD:
            a, extra = instruction.number, last_use[instruction.value]
        elif instruction.code == STORE:
            b, extra = instruction.number, 0
        words.append(instruction.code | dst << 8 | a << 16 | b << 24 | c << 32 | extra << 40)
    return words, constants, count
