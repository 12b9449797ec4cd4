"""Reading and editing Dynamo's FX graph in canonical terms.

Dynamo writes one operation in many ways (`x + y`, `torch.add`, `x.add`). `kind(node)` gives all of them one name, `fake(node)` the
example value that carries shape, dtype and strides, `emit` adds a node with its example value computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llmopt.sizes import Size, expression, same_size, same_stride

NOTE = "llmopt_note"  # key of node.meta: a remark of a pass that reports show

# Spellings whose own name is not the canonical one.
_ALIASES = {
    "__add__": "add",
    "__mul__": "mul",
    "truediv": "div",
    "true_divide": "div",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "negative": "neg",
    "swapaxes": "transpose",
    "moveaxis": "movedim",
    "concat": "cat",
    "concatenate": "cat",
    "type": "to",
    "iadd": "add_",
    "imul": "mul_",
    "isub": "sub_",
    "itruediv": "div_",
    "ifloordiv": "floor_divide_",
    "imod": "remainder_",
    "ipow": "pow_",
    "iand": "bitwise_and_",
    "ior": "bitwise_or_",
    "ixor": "bitwise_xor_",
    "ilshift": "bitwise_left_shift_",
    "irshift": "bitwise_right_shift_",
    "setitem": "setitem_",
}
_ALIASES |= {f"__{name}__": own for name, own in _ALIASES.items() if own.endswith("_")}

# What torch.arange may be told without counting otherwise or elsewhere.
PLAIN_ARANGE = frozenset({"device", "dtype", "layout", "pin_memory", "requires_grad"})

# Where PyTorch's own functions are defined; the name of any other says nothing about what it computes.
_PYTORCH = ("torch", "_operator", "builtins", "math")

# The dtypes kernels compute on.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Methods that only cast: name → dtype.
CASTS = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "long": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
}


def kind(node: fx.Node) -> str:
    """The canonical name of a node's operation; in-place operations end in an underscore."""
    cached = node.meta.get("llmopt_kind")
    if cached is not None:
        return cached
    name = _kind(node)
    node.meta["llmopt_kind"] = name
    return name


def _kind(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = _name(node)
    return name if node.kwargs.get("out") is None else f"{name}.out"


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return _ALIASES.get(node.target, node.target)
    target = node.target
    if target is getattr:
        return "getattr_" + str(node.args[1]) if len(node.args) > 1 else "getattr"
    name = getattr(target, "__name__", str(target))
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        namespace, _, name = _qualified_name(target).partition("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    module = getattr(target, "__module__", "") or ""
    if module.startswith("llmopt."):
        return "llmopt." + name
    if module and module.split(".")[0] not in _PYTORCH:
        return f"{module}.{name}"
    if node.kwargs.get("inplace") is True:
        return name.rstrip("_") + "_"
    return _ALIASES.get(name, name)


def _qualified_name(target: OpOverload | OpOverloadPacket) -> str:
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    return packet._qualified_op_name


def fake(node: Any) -> Any:
    """The example value of a node (FakeTensor, SymInt, tuple …); anything that is not a node is returned as it is."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(fake(node), torch.Tensor)


def unreadable(node: Any) -> str:
    """Why the elements of a value are not what lies in its memory, or ""."""
    for value in tensors_in(fake(node)):
        if is_traceable_wrapper_subclass(value):
            return f"a {type(value).__name__}, which has no memory of its own"
        if value.layout is not torch.strided:
            return f"{str(value.layout).removeprefix('torch.')}, not strided"
        if value.is_neg() or value.is_conj():
            return "negated or conjugated only when PyTorch reads it"
    return ""


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an example value: itself, or the parts of a tuple."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def is_one(size: Size) -> bool:
    return isinstance(expression(size), int) and expression(size) == 1


def is_dense(tensor: torch.Tensor, order: Sequence[int] | None = None) -> bool:
    """True when the tensor is contiguous (in the given dimension order); never adds a guard."""
    expected: Size = 1
    for d in reversed(order if order is not None else range(tensor.dim())):
        if is_one(tensor.shape[d]):
            continue
        if not same_stride(tensor.stride(d), expected):
            return False
        expected = expected * tensor.shape[d]
    return True


def numel(tensor: torch.Tensor) -> Size:
    total: Size = 1
    for s in tensor.shape:
        total = total * s
    return total


def is_empty(tensor: torch.Tensor) -> bool:
    return any(isinstance(expression(s), int) and expression(s) == 0 for s in tensor.shape)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        value = fake(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def map_fakes(value: Any) -> Any:
    """Replaces nodes by their example values in nested arguments."""
    return fx.node.map_arg(value, fake)


def compute_fake(mode: FakeTensorMode, target: Callable | str, args: Any, kwargs: Any) -> Any:
    """The example value of a call, from the example values of its arguments."""
    fake_args, fake_kwargs = map_fakes(tuple(args)), map_fakes(dict(kwargs))
    rule = getattr(target, "fake", None)
    # As Dynamo does: some operations take sizes that change only in their Python form.
    with mode, torch.no_grad(), enable_python_dispatcher(), _uncached(mode, fake_args):
        if isinstance(target, str):
            return getattr(fake_args[0], target)(*fake_args[1:], **fake_kwargs)
        return (rule or target)(*fake_args, **fake_kwargs)


@contextmanager
def _uncached(mode: FakeTensorMode, args: tuple) -> Iterator[None]:
    """Without the mode's cache where sizes are symbols: taking a window from a cached one takes up to five times what computing it does."""
    symbolic = any(isinstance(a, FakeTensor) and a._has_symbolic_sizes_strides for a in args)
    if not (symbolic and mode.cache_enabled):
        yield
        return
    mode.cache_enabled = False
    try:
        yield
    finally:
        mode.cache_enabled = True


def emit(
    graph: fx.Graph,
    mode: FakeTensorMode,
    target: Callable | str,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    like: fx.Node | None = None,
    value: Any = None,
) -> fx.Node:
    """Adds a call at the graph's insertion point, with its example value; `like` lends its source location.

    value: the example value where it is known, which saves computing it.
    """
    op = "call_method" if isinstance(target, str) else "call_function"
    node = graph.create_node(op, target, tuple(args), kwargs or {})
    if like is not None:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
    if value is None:
        value = compute_fake(mode, target, args, kwargs or {})
    node.meta["example_value"] = value
    return node


def own_value(node: fx.Node) -> Any:
    """The example value of a node with dense memory of its own, for a replacement that gives the same; else None."""
    value = fake(node)
    owns = isinstance(value, torch.Tensor) and not is_view(node) and not is_in_place(node)
    return value if owns and is_dense(value) else None


def replace(old: fx.Node, new: fx.Node) -> None:
    """Gives every use of `old` to `new` and removes `old`; example values downstream follow the new memory."""
    replace_all(((old, new),))


def replace_all(pairs: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Replaces several nodes, and follows their new memory downstream once.

    A new node whose memory is laid out as the old one's was takes over the old example value, which windows downstream are on.
    """
    stale: list[fx.Node] = []
    for old, new in pairs:
        if _takes_over(old, new):
            new.meta["example_value"] = fake(old)
        stale += _stale_users(old, fake(new))
        old.replace_all_uses_with(new)
        old.graph.erase_node(old)
    refresh(stale)


def _takes_over(old: fx.Node, new: fx.Node) -> bool:
    """True when both have memory of their own, alike in all, and nobody reads the new node yet."""
    if new.users or new.op not in ("call_function", "call_method"):
        return False
    if any(is_view(n) or is_in_place(n) for n in (old, new)) or not _same_layout(
        fake(old), fake(new)
    ):
        return False
    return old.op in ("call_function", "call_method") and fake(old).device == fake(new).device


def _stale_users(node: fx.Node, now: Any) -> list[fx.Node]:
    """Users whose example value is wrong once `node`'s becomes `now`.

    Views and what writes in place follow the memory, other operations the layout; an op's `fake` looks at shapes and dtypes only.
    """
    before = fake(node)
    if now is before:
        return []
    if _same_layout(before, now):
        return [u for u in node.users if is_view(u) or is_in_place(u)]
    if not _same_shape(before, now):
        return list(node.users)
    return [u for u in node.users if is_view(u) or not hasattr(u.target, "fake") or is_in_place(u)]


def _same_shape(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)


def _same_layout(a: Any, b: Any) -> bool:
    """Equal addresses for equal indices: the stride of a dimension of one says nothing."""
    if not _same_shape(a, b):
        return False
    wide = [d for d in range(a.dim()) if not is_one(a.shape[d])]
    return all(same_stride(a.stride(d), b.stride(d)) for d in wide)


def _fakes_in(value: Any) -> list[FakeTensor]:
    pieces = value if isinstance(value, (tuple, list)) else (value,)
    return [p for p in pieces if isinstance(p, FakeTensor)]


def refresh(nodes: list[fx.Node]) -> None:
    """Recomputes the example values of nodes whose input moved or changed layout, and of what depends on them."""
    waiting = set(nodes)
    queue = sorted(waiting)
    while queue:
        node = heappop(
            queue
        )  # the earliest first: each is computed once, from inputs that are final
        waiting.remove(node)
        first = next((v for n in node.all_input_nodes for v in _fakes_in(fake(n))), None)
        is_call = node.op in ("call_function", "call_method")
        if not is_call or first is None or isinstance(node.target, HigherOrderOperator):
            continue  # what runs a graph gives the same whatever its inputs are laid out like
        if is_in_place(node) and (returned := _returned(node)) is not None:
            new = fake(returned) if is_tensor(node) else fake(node)
        else:
            allow_a_copy(node)
            new = compute_fake(first.fake_mode, node.target, node.args, node.kwargs)
        stale = list(node.users) if isinstance(new, (tuple, list)) else _stale_users(node, new)
        node.meta["example_value"] = new
        for user in stale:
            if user not in waiting:
                waiting.add(user)
                heappush(queue, user)


def _returned(node: fx.Node) -> fx.Node | None:
    """The argument that an in-place operation gives back, None for one whose result has memory of its own."""
    if kind(node).endswith(".out") or not schemas(node.target):
        given = [node.kwargs.get("out"), *(node.args[:1] if kind(node).endswith("_") else ())]
        return next(filter(is_tensor, given), None)
    for schema in schemas(node.target):
        alias = schema.returns[0].alias_info if len(schema.returns) == 1 else None
        for i, a in enumerate(schema.arguments if alias is not None else ()):
            is_it = a.alias_info and alias and a.alias_info.before_set == alias.before_set
            if is_it and is_tensor(found := argument(node, i, a.name)):
                return found
    return None


_COPYING = {"view": "reshape", "view_as": "reshape_as"}


def allow_a_copy(node: fx.Node) -> None:
    """A view of the traced layout may need a copy in ours. A view as another dtype (`view(dtype)`) stays what it is."""
    size = argument(node, 1, "size")
    if kind(node) in _COPYING and not isinstance(argument(node, 1, "dtype", size), torch.dtype):
        node.op, node.target = "call_method", _COPYING[kind(node)]
        node.kwargs = {"shape" if k == "size" else k: v for k, v in node.kwargs.items()}
        node.meta.pop("llmopt_kind", None)


def storage(node: fx.Node) -> int | None:
    """Identity of the memory behind a tensor node: equal for a tensor and its views, split into pieces or not. None for other values."""
    value = fake(node)
    if isinstance(value, (tuple, list)) and value and kind(node) in _PIECES:
        value = value[0]
    return value.untyped_storage()._cdata if isinstance(value, FakeTensor) else None


# Views that come as a tuple of pieces.
_PIECES = frozenset({"split", "chunk", "unbind", "tensor_split", "split_with_sizes"})


def is_view(node: fx.Node) -> bool:
    """True when the node's result is a window on one of its inputs' memory."""
    if node.op not in ("call_function", "call_method") or is_in_place(node):
        return False
    mine = storage(node)
    return mine is not None and any(storage(n) == mine for n in node.all_input_nodes)


def view_base(node: fx.Node) -> fx.Node:
    """The node whose memory a value is a window on: through views and in-place results; itself when it owns its memory."""
    while is_view(node) or is_in_place(node):
        mine = storage(node)
        source = next(
            (n for n in node.all_input_nodes if mine is not None and storage(n) == mine), None
        )
        if source is None:
            return node
        node = source
    return node


# Names that end in an underscore and write nothing: Python's operator module escapes keywords so.
_NOT_MUTATING = frozenset({"requires_grad_", "and_", "or_", "not_", "is_", "in_"})


def is_in_place(node: fx.Node) -> bool:
    """True when the node writes into one of its inputs."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = kind(node)
    if name.endswith("_") and not name.endswith("__") and name not in _NOT_MUTATING:
        return True
    if name.endswith(".out") or (name in _WHEN_TOLD and written_when_told(node)):
        return True
    written = [a for s in schemas(node.target) for a in s.arguments if a.is_write]
    return any(not a.kwarg_only or a.name in node.kwargs for a in written)


# Functions that write into some of their arguments where another one says so: name → (its place, its names, theirs).
_WHEN_TOLD = {
    "batch_norm": (5, ("training",), slice(1, 5)),
    "native_batch_norm": (5, ("training",), slice(1, 5)),
    "instance_norm": (5, ("use_input_stats",), slice(1, 5)),
    "embedding": (3, ("max_norm",), slice(1, 2)),
    "embedding_bag": (3, ("max_norm",), slice(1, 2)),
}


def written_when_told(node: fx.Node) -> list[fx.Node]:
    """The arguments that such a function writes into, or may."""
    if node.op != "call_function" or (rule := _WHEN_TOLD.get(kind(node))) is None:
        return []
    place, names, written = rule
    told = node.args[place] if len(node.args) > place else None
    if told in (None, False) and all(node.kwargs.get(n) in (None, False) for n in names):
        return []
    return [a for a in (*node.args[written], *node.kwargs.values()) if isinstance(a, fx.Node)]


def readers(value: fx.Node) -> list[fx.Node]:
    """Everybody who reads a value's memory, through views and in-place results."""
    found: dict[fx.Node, None] = {}
    waiting = [value]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found[user] = None
                if is_view(user) or (is_in_place(user) and storage(user) == storage(value)):
                    waiting.append(user)
    return list(found)


def schemas(target: Any) -> list[torch.FunctionSchema]:
    """The signatures of a registered operator; of a packet, those of all its overloads."""
    if isinstance(target, OpOverload):
        return [target._schema]
    if isinstance(target, OpOverloadPacket):
        return [getattr(target, name)._schema for name in target.overloads()]
    return []


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only user of a node, or None when it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def scalar(value: Any) -> float | None:
    """A Python number, or None for anything else (SymInts and tensors included)."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def binary_operands(node: fx.Node) -> tuple[Any, Any] | None:
    """Both operands of a plain two-operand node; None when it has others (alpha=, rounding_mode=)."""
    extra = {
        k: v for k, v in node.kwargs.items() if k not in ("other", "input") and v not in (1, None)
    }
    operands = [*node.args]
    if "other" in node.kwargs:
        operands.append(node.kwargs["other"])
    if extra or len(operands) != 2:
        return None
    return operands[0], operands[1]


getitem = operator.getitem
