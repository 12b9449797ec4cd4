"""The CUDA C++ kernels (csrc/cuda) from Python: records of what to launch, and the library that launches them.

The library is built with `pip install . -C cmake.define.LLMOPT_CUDA=ON` and opened when it is first asked for. It needs the NVIDIA
driver and a current CUDA context, and nothing else of CUDA. Pointers are device addresses as integers (`tensor.data_ptr()`), 0 where an
operand is left out; what each means is written beside it in csrc/cuda/problems.h, whose records these are.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path

from llmopt import _C

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class CudaError(RuntimeError):
    """What the kernels were asked for and why it is not possible here."""


def _fields(*kinds: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in kinds for name in names.split()]


class LinearW8A8(ctypes.Structure):
    """y [M,N] = act(x_scale·w_scale·(x @ wᵀ) + bias) + residual; x [M,K], w [N,K] int8."""

    _fields_ = _fields(
        (_P, "x w x_scale w_scale bias residual y"),
        (_L, "x_stride w_stride residual_stride y_stride"),
        (_I, "m n k dtype act reserved"),
    )


class LinearW4A16(ctypes.Structure):
    """y [M,N] = act(x @ wᵀ + bias) + residual; x [M,K] f16 or bf16, w 4-bit codes [N,K/2] with fp32 scales (and offsets) per group."""

    _fields_ = _fields(
        (_P, "x codes scale offset bias residual y"),
        (_L, "x_stride residual_stride y_stride"),
        (_I, "m n k group dtype act"),
    )


class AttentionDecode(ctypes.Structure):
    """o [B,H,D] = softmax(scale·q kᵀ) v over a cache [B,Hkv,S,D] in f16, or in int8 with scales [B,Hkv,S].

    A sequence has lengths [B] keys, or `keys` where there are no lengths.
    """

    _fields_ = _fields(
        (_P, "q k v k_scale v_scale lengths o partial finished"),
        (
            _L,
            "batch_stride head_stride row_stride scale_batch_stride scale_head_stride scale_row_stride",
        ),
        (_F, "scale"),
        (_I, "batch heads kv_heads head_dim splits cache_dtype keys"),
    )

    def partial_floats(self) -> int:
        """Floats of scratch that `partial` points to, for these sizes and splits."""
        per_split = self.batch * self.heads * (self.head_dim + 2)
        return per_split * self.splits if self.splits > 1 else 0

    def num_counters(self) -> int:
        """int32 counters that `finished` points to; zero before the first launch."""
        return self.batch * self.kv_heads * -(-self.heads // self.kv_heads // MAX_HEADS)


MAX_HEADS = 8  # query heads of a block of attention_decode
RECORDS = {
    LinearW8A8: "llmopt_cuda_linear_w8a8",
    LinearW4A16: "llmopt_cuda_linear_w4a16",
    AttentionDecode: "llmopt_cuda_attention_decode",
}


class Prepared(ctypes.Structure):
    """A launch as whoever repeats it needs it: a CUfunction whose one parameter is the record, and how it is launched."""

    _fields_ = (("function", _P), ("grid", ctypes.c_uint32 * 3), ("threads", _I), ("shared_bytes", _I))  # fmt: skip


class Library:
    """A built library of kernels over a driver. Raises CudaError when either cannot be opened, or was built from other records."""

    def __init__(self, path: Path, driver: str = "libcuda.so.1") -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise CudaError(f"the CUDA kernels cannot be loaded: {error}") from error
        for name in (
            *RECORDS.values(),
            "llmopt_cuda_open",
            "llmopt_cuda_check",
            "llmopt_cuda_prepare",
        ):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.llmopt_cuda_decode_splits.restype = ctypes.c_char_p
        built = [self._library.llmopt_cuda_record_bytes(i) for i in range(len(RECORDS))]
        if built != [ctypes.sizeof(record) for record in RECORDS]:
            raise CudaError(f"{path} was built from other sources: build it again")
        self._raise(self._library.llmopt_cuda_open(driver.encode()))

    @functools.cached_property
    def digest(self) -> str:
        """Of the kernels and launchers as they were built."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def check(self) -> None:
        """Raises CudaError unless the current context's GPU can run the kernels."""
        self._raise(self._library.llmopt_cuda_check())

    def launch(self, problem: LinearW8A8 | LinearW4A16 | AttentionDecode, stream: int = 0) -> None:
        """Checks the problem, chooses its kernel and launches it on a CUDA stream (an address, 0: the default stream).

        Raises CudaError where the problem is not possible or the driver refuses it.
        """
        function = getattr(self._library, RECORDS[type(problem)])
        self._raise(function(ctypes.byref(problem), ctypes.c_void_p(stream)))

    def prepare(self, problem: LinearW8A8 | LinearW4A16 | AttentionDecode) -> Prepared:
        """As `launch`, but for the launch itself: loads the kernel into the current context and says how it is launched.

        Pointers may be any that are aligned as the memory will be. Raises CudaError also where there is nothing to launch.
        """
        prepared, number = Prepared(), list(RECORDS).index(type(problem))
        self._raise(self._library.llmopt_cuda_prepare(number, ctypes.byref(problem), ctypes.byref(prepared)))  # fmt: skip
        return prepared

    def decode_splits(self, batch: int, heads: int, kv_heads: int, keys: int) -> int:
        """Blocks that share the keys of one head: a guess that fills the GPU, not measured."""
        splits = ctypes.c_int()
        sizes = (ctypes.c_int(size) for size in (batch, heads, kv_heads, keys))
        self._raise(self._library.llmopt_cuda_decode_splits(*sizes, ctypes.byref(splits)))
        return splits.value

    @staticmethod
    def _raise(error: bytes | None) -> None:
        if error is not None:
            raise CudaError(error.decode())


@functools.cache
def library() -> Library:
    """The library of this installation. Raises CudaError that says what is missing: the build, the driver."""
    path = Path(_C.__file__).with_name("libllmopt_cuda.so")
    if not path.exists():
        raise CudaError(
            "this build has no CUDA kernels: `pip install . -C cmake.define.LLMOPT_CUDA=ON` builds them; it needs nvcc"
        )
    return Library(path)


def missing() -> str:
    """Why the CUDA kernels cannot run here: not built, no driver, no current context, a GPU they were not built for; "" if they can."""
    try:
        library().check()
    except CudaError as error:
        return str(error)
    return ""
