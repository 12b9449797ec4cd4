"""Launches of Triton kernels made ready for csrc/gpu/launches.h: all but the addresses is packed once, so that a call costs microseconds.

triton's own launcher looks at every argument of every launch again, in Python. Here a launch that was planned on meta tensors becomes a
compiled kernel's handle, a grid and slots; a tensor becomes a place in a buffer, whose address is filled in when it is launched.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmopt import _C
from llmopt.gpu.compile import binary, signature
from llmopt.gpu.run import is_out_of_resources
from llmopt.launch import Descriptor, Launch
from llmopt.native import cuda
from llmopt.native.cuda_kernels import CudaFunction
from llmopt.types import Target

log = logging.getLogger("llmopt")

_MASK = (1 << 64) - 1
_FOUND, _OFFSET_BITS = 1 << 60, 44  # of addresses that are not known yet
_FIXED = (
    1 << 32
) - 1  # in the place of a buffer: the offset is the address, kFixed of csrc/gpu/launches.h
_BYTES = {"pointer": 8, "i32": 4, "i64": 8, "fp32": 4, "map": 128}
_SCRATCH = (
    8,
    8,
)  # what triton's compiler adds behind a kernel's own parameters: global and profiler's scratch
Place = tuple[int, int]  # a buffer and bytes behind its start
Find = Callable[[str, Tensor], Place]  # where the tensor of a parameter is


class NotNative(Exception):
    """This launch cannot be packed; the message says why. Whoever asked launches it through triton."""


@dataclass(frozen=True)
class Handle:
    """A compiled kernel loaded on a device."""

    kernel: Any  # triton's; keeps the module
    function: int
    threads: int
    shared: int
    parameters: tuple[tuple[str, str], ...]  # (kind of _BYTES, name), in order
    maps: tuple[dict[str, Any], ...]  # triton's facts of each descriptor


@dataclass
class Packed:
    """The launches of one step, and what they point to that nobody else may keep."""

    launches: _C.Launches = field(default_factory=_C.Launches)
    kept: list[Any] = field(default_factory=list)  # those tensors, and the kernels
    scratch_bytes: int = 0


_handles: dict[tuple, Handle] = {}


def pack(launches: Sequence[Launch], target: Target, device: torch.device, find: Find) -> Packed:
    """Raises NotNative where one of them cannot be packed. find: says where tensors on the meta device are; it may raise NotNative too."""
    packed = Packed()
    for launch in launches:
        if isinstance(launch.function, CudaFunction):
            _add_cuda(packed, launch, find)
        else:
            _add(packed, launch, handle_of(launch, target, device), find)
    return packed


def _add(packed: Packed, launch: Launch, handle: Handle, find: Find) -> None:
    slots: list[int] = []
    places: list[tuple[int, int, int]] = []
    matrices: list[_C.Matrix] = []

    def put(name: str, tensor: Tensor) -> tuple[int, int, int]:
        slot = len(slots)
        slots.append(0)
        if tensor.is_meta:
            return (slot, *find(name, tensor))
        return slot, _FIXED, _kept(packed, tensor)

    parameters = []
    for kind, name in handle.parameters:
        value = launch.arguments[name]
        parameters.append(len(slots))
        if kind == "pointer":
            place = put(name, value)
            if place[1] == _FIXED:
                slots[place[0]] = place[2]
            else:
                places.append(place)
        elif kind == "fp32":
            slots.append(struct.unpack("<I", struct.pack("<f", value))[0])
        elif kind == "map":
            place = put(name, value.tensor)
            matrices.append(_matrix(place, value, handle.maps[len(matrices)]))
            numbers = (*value.tensor.shape, *value.tensor.stride())
            parameters += range(len(slots), len(slots) + len(numbers))
            slots += numbers
        else:
            slots.append(value & _MASK)
    parameters += range(len(slots), len(slots) + len(_SCRATCH))
    slots += [0] * len(_SCRATCH)
    grid = (*launch.grid, 1, 1)[:3]
    packed.kept.append(handle)
    packed.launches.add(
        launch.kernel,
        handle.function,
        grid,
        handle.threads,
        handle.shared,
        slots,
        parameters,
        places,
        matrices,
    )


def _kept(packed: Packed, tensor: Tensor) -> int:
    """The address of a tensor that a launch points to. Raises NotNative where it is not aligned as its offset says."""
    address = tensor.data_ptr()
    if (address - tensor.storage_offset() * tensor.element_size()) % 16:
        raise NotNative("a weight's memory does not begin at a multiple of 16 bytes")
    packed.kept.append(tensor)
    return address


def _add_cuda(packed: Packed, launch: Launch, find: Find) -> None:
    """A kernel of csrc/cuda, whose one parameter is a record; its addresses are pointers among the record's fields."""
    names = {id(value): name for name, value in launch.arguments.items()}
    found: list[Place] = []

    def address(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if not tensor.is_meta:
            return _kept(packed, tensor)
        found.append(find(names[id(tensor)], tensor))
        # Above all real addresses, aligned as the memory will be, and it says which of the found it is.
        return _FOUND + ((len(found) - 1) << _OFFSET_BITS) + found[-1][1]

    record = launch.function.record(**launch.arguments, address=address)
    prepared = cuda.library().prepare(record)
    raw = bytes(record)
    slots = list(struct.unpack(f"<{len(raw) // 8}Q", raw))
    places = []
    for name, kind in type(record)._fields_:
        slot = getattr(type(record), name).offset // 8
        if kind is ctypes.c_void_p and slots[slot] >= _FOUND:
            buffer, offset = found[(slots[slot] - _FOUND) >> _OFFSET_BITS]
            places.append((slot, buffer, offset))
    assert len(places) == len(found), f"{launch.kernel}: an address is no field of its record"
    packed.launches.add(
        launch.kernel, prepared.function, tuple(prepared.grid), prepared.threads, prepared.shared_bytes, slots, [0], places, []
    )  # fmt: skip


def _matrix(place: tuple[int, int, int], value: Descriptor, facts: dict[str, Any]) -> _C.Matrix:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST as DATA_TYPES

    rows, columns = value.tensor.shape
    row_bytes = value.tensor.stride(0) * value.tensor.element_size()
    box_rows, box_columns = facts["block_size"]
    data_type = DATA_TYPES[facts["elem_type"]]
    return _C.Matrix(place, data_type, facts["swizzle"], rows, columns, row_bytes, box_rows, box_columns)  # fmt: skip


def handle_of(launch: Launch, target: Target, device: torch.device) -> Handle:
    """The kernel a launch runs, compiled and loaded the first time. Raises NotNative where it has more to it than packed slots give."""
    kinds = tuple(_kind(launch.arguments.get(n)) for n in launch.function.arg_names if n not in launch.constants)  # fmt: skip
    key = (
        id(launch.function), tuple(launch.constants.items()), kinds, launch.num_warps, launch.num_stages,
        device.index, target.tier,
    )  # fmt: skip
    found = _handles.get(key)
    if found is None:
        found = _handles.setdefault(key, _loaded(launch, target))
    return found


def _kind(value: Any) -> Any:
    """What of an argument a kernel is specialised for."""
    if isinstance(value, Tensor):
        return value.dtype, value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, Descriptor):
        return "map", value.tensor.dtype, value.block
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return type(value)


def _loaded(launch: Launch, target: Target) -> Handle:
    types, _, _ = signature(launch)
    names = [n for n in launch.function.arg_names if types[n] != "constexpr"]
    parameters = tuple((_parameter(types[n], launch.arguments[n]), n) for n in names)
    kernel = binary(launch, target, _arch())
    facts = kernel.metadata
    for name, plain in (("num_ctas", 1), ("global_scratch_size", 0), ("profile_scratch_size", 0),
                        ("launch_cooperative_grid", False), ("launch_pdl", False)):  # fmt: skip
        if getattr(facts, name, plain) not in (plain, None):
            raise NotNative(f"{launch.kernel}: {name} is {getattr(facts, name)}")
    maps = tuple(getattr(facts, "tensordesc_meta", None) or ())
    if len(maps) != sum(kind == "map" for kind, _ in parameters):
        raise NotNative(f"{launch.kernel}: its descriptors are not tensor maps")
    try:
        kernel._init_handles()
    except Exception as error:
        if not is_out_of_resources(error):
            raise
        raise NotNative(str(error)) from error  # whoever launches it says what does not fit
    expected = [b for kind, _ in parameters for b in bytes_of(kind)] + list(_SCRATCH)
    try:
        actual = _C.parameter_bytes(kernel.function)
    except RuntimeError as error:
        raise NotNative(f"{launch.kernel}: {error}") from error
    if actual != expected:
        raise NotNative(
            f"{launch.kernel} takes parameters of {actual} bytes, {expected} were expected"
        )
    threads = facts.num_warps * target.gpu.warp_size  # type: ignore[union-attr]
    return Handle(kernel, kernel.function, threads, facts.shared, parameters, maps)


def _arch() -> Any:
    """The GPU's own generation, for which triton's launcher compiles too; a target's row may be of an older one."""
    import triton

    return triton.runtime.driver.active.get_current_target().arch


def _parameter(type_: str, value: Any) -> str:
    if isinstance(value, bool):
        raise NotNative("a truth value among a kernel's arguments")
    if isinstance(value, Descriptor):
        return "map"
    return "pointer" if type_.startswith("*") else type_


def bytes_of(kind: str) -> list[int]:
    """Of the parameters of a kind of argument: of a descriptor also two sizes and two strides."""
    return [_BYTES[kind], 4, 4, 8, 8] if kind == "map" else [_BYTES[kind]]
