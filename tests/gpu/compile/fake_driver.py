"""A GPU's driver for triton that loads and launches nothing: it notes what it was given. All above it is what runs on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmopt.types import Target
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


@dataclass
class Launched:
    """One launch as the driver got it."""

    grid: tuple[int, int, int]
    stream: int
    binary: bytes
    arguments: tuple[Any, ...]


@dataclass
class FakeDriver(DriverBase):
    """For `triton.runtime.driver.set_active`; `stream` is the current one."""

    target: Target
    stream: int = 7
    binaries: list[bytes] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise AssertionError("a launch asks the driver for this: fake it too")

    def get_active_torch_device(self) -> Any:
        raise AssertionError("a launch asks the driver for this: fake it too")

    def get_benchmarker(self) -> Any:
        raise AssertionError("a launch asks the driver for this: fake it too")

    def get_current_target(self) -> GPUTarget:
        assert self.target.gpu is not None
        arch = self.target.gpu.arch
        cuda = self.target.device == "cuda"
        return GPUTarget(self.target.device, int(arch) if cuda else arch, self.target.gpu.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    @property
    def utils(self) -> FakeDriver:
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        assert self.target.gpu is not None
        return {"max_shared_mem": self.target.gpu.smem_block}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        self.binaries.append(binary)
        return object(), len(self.binaries) - 1, 64, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            binary = self.binaries[function]
            self.launched.append(Launched((x, y, z), stream, binary, rest[4:]))

        return launch
