"""What stands around a linear's matrix product, and the memory blocks of a launch share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from llmopt.counters import counters
from llmopt.types import Target


@dataclass(frozen=True)
class Around:
    """bias and up_bias [N], residual [M, N] with dense rows, norm_weight and norm_bias [K]; None where not given."""

    bias: Any = None
    up_bias: Any = None
    residual: Any = None
    alpha: float = 1.0
    norm_weight: Any = None
    norm_bias: Any = None
    norm_eps: float = 0.0
    norm_offset: float = 0.0

    READS: ClassVar = (
        "bias_ptr",
        "up_bias_ptr",
        "residual_ptr",
        "norm_weight_ptr",
        "norm_bias_ptr",
    )

    def arguments(self) -> dict[str, Any]:
        """The epilogue's share of a launch's arguments."""
        return {
            "bias_ptr": self.bias,
            "up_bias_ptr": self.up_bias,
            "residual_ptr": self.residual,
            "stride_rm": 0 if self.residual is None else self.residual.stride(0),
            "alpha": float(self.alpha),
        }

    def norm_arguments(self) -> dict[str, Any]:
        """The share of the norm in front, in kernels that have one."""
        return {
            "norm_weight_ptr": self.norm_weight,
            "norm_bias_ptr": self.norm_bias,
            "norm_eps": self.norm_eps,
            "norm_offset": self.norm_offset,
        }


def splits_for(tiles: int, k_steps: int, t: Target) -> int:
    """Into how many blocks to split each tile: enough to fill the GPU once, each with at least four steps."""
    splits = 1
    while tiles * splits * 2 <= t.gpu.sms and splits * 2 * 4 <= k_steps:
        splits *= 2
    return splits


def workspace(
    like: torch.Tensor, tiles: int, splits: int, size: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(partial results [tiles · splits, size] fp32, counters [tiles] of zeros); (None, None) where nothing is split."""
    if splits == 1:
        return None, None
    partial = torch.empty(tiles * splits * size, dtype=torch.float32, device=like.device)
    return partial, counters(like.device, tiles)


def dtype_name(dtype: torch.dtype) -> str:
    """Triton's name of a torch dtype."""
    return _NAMES[dtype]


_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
